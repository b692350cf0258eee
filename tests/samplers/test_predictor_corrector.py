"""Predictor-corrector sampling beside exact recursions, printed figures and annealed Langevin."""

import math

import exact
import numpy as np
import pytest
import torch

from ncsn_fast.ops.noise import Stream
from ncsn_fast.samplers.langevin import annealed_langevin
from ncsn_fast.samplers.predictor_corrector import (
    annealed_snr,
    evaluations,
    langevin_step,
    predictor_corrector,
)
from ncsn_fast.samplers.procedure import contract_noise, per_sample
from ncsn_fast.samplers.program import Chains, InjectedNoise, run


class Sphere:
    """One sample whose noise is orthogonal to it and has norm sqrt(D): the limit of large D.

    |x - mean|^2 / D then follows the recursion of the variance exactly, and every norm is the
    expected one.
    """

    def __init__(self, data, variance, d=16):
        self.data, self.random = data, np.random.RandomState(0)
        self.x = data.mean + math.sqrt(variance) * torch.ones(1, d, dtype=torch.float64)

    def score(self, x, sigma):
        self.x = x
        return self.data.score(x, sigma)

    def draw(self, stream, step):
        z = torch.from_numpy(self.random.standard_normal(self.x.shape))
        along = (self.x - self.data.mean) / (self.x - self.data.mean).norm()
        z = z - (z * along).sum() * along
        return z * math.sqrt(z.numel()) / z.norm()

    def variance(self, sigmas, **options):
        x, _ = predictor_corrector(self.score, self.x, sigmas, self.draw, **options)
        return float((x - self.data.mean).square().mean())


def chain(n, spread2, *, low=0.01, high=50.0, **options):
    """Variance that a chain from N(m, high^2) ends with, on data of variance spread2."""
    data = exact.Gaussian(mean=0.0, spread=math.sqrt(spread2))
    return Sphere(data, high**2).variance(np.geomspace(high, low, n), **options)


@pytest.mark.parametrize(("predictor", "n", "spread2", "mean", "noisy"), [
    ("reverse_diffusion", 1000, 0.25, 0.252043, 0.252143),
    ("ancestral", 1000, 0.25, 0.247782, None),
    ("flow", 1000, 0.25, 0.258879, 0.258879),
    ("reverse_diffusion", 100, 0.25, 0.272692, None),
    ("ancestral", 100, 0.25, 0.229590, None),
    ("flow", 100, 0.25, 0.355718, None),
    ("reverse_diffusion", 2000, 0.25, 0.250968, None),
    ("ancestral", 2000, 0.25, 0.248839, None),
    ("flow", 2000, 0.25, 0.254386, None),
    ("reverse_diffusion", 1000, 0.0625, 0.062936, None),
    ("ancestral", 1000, 0.0625, 0.061872, None),
    ("flow", 1000, 0.0625, 0.065108, None),
])  # fmt: skip
def test_predictors_alone_end_at_the_printed_variance(predictor, n, spread2, mean, noisy):
    options = {"predictor": predictor, "corrector_steps": 0}
    assert chain(n, spread2, **options) == pytest.approx(mean, abs=6e-7)
    if noisy is not None:
        assert chain(n, spread2, denoise=False, **options) == pytest.approx(noisy, abs=6e-7)


@pytest.mark.parametrize(("predictor", "spread2", "mean"), [
    ("reverse_diffusion", 0.25, 0.256297), ("ancestral", 0.25, 0.256297), ("flow", 0.25, 0.256400),
    ("reverse_diffusion", 0.0625, 0.063997), ("ancestral", 0.0625, 0.063997),
    ("flow", 0.0625, 0.064100),
])  # fmt: skip
def test_corrected_chains_end_at_the_printed_variance(predictor, spread2, mean):
    assert chain(1000, spread2, predictor=predictor) == pytest.approx(mean, abs=6e-7)


def test_noise_of_the_last_step():
    assert chain(1000, 0.25, denoise=False) == pytest.approx(0.256397, abs=6e-7)


def tutorial(schedule, n):
    """Levels and variances of Euler-Maruyama on linspace(1, 1e-3, n), and the start's variance."""
    t = np.linspace(1.0, 1e-3, n)
    variances = schedule.g2(t).numpy() * (t[0] - t[1])
    return schedule.variance(t).sqrt().numpy(), variances, float(schedule.variance(1.0))


@pytest.mark.parametrize(("schedule", "n", "mean", "noisy"), [
    (exact.COURSE, 50, 0.2519262, 0.2519581),
    (exact.COURSE, 500, 0.2500148969, 0.2500180263),
    (exact.COURSE, 1000, 0.2500031806, 0.2500047438),
    (exact.SONG, 50, 0.2212482, 0.2417677),
    (exact.SONG, 500, 0.2479859152, 0.2500008492),
])  # fmt: skip
def test_tutorials_euler_maruyama(schedule, n, mean, noisy):
    sigmas, variances, start = tutorial(schedule, n)
    options = {"variances": variances, "corrector_steps": 0}
    digits = 6e-8 if n == 50 else 6e-10
    data = exact.Gaussian(mean=0.5, spread=0.5)
    found = [Sphere(data, start).variance(sigmas, denoise=d, **options) for d in (True, False)]
    assert found == pytest.approx([mean, noisy], abs=digits)


@pytest.mark.parametrize(("schedule", "mean"), [
    (exact.COURSE, 0.49977079), (exact.SONG, 0.49876756),
])  # fmt: skip
def test_tutorials_mean(schedule, mean):
    """Chains that start around 0 end around m, less the little that the prior is off."""
    sigmas, variances, _ = tutorial(schedule, 500)
    data = exact.Gaussian(mean=0.5, spread=0.5)
    x, _ = predictor_corrector(
        data.score, torch.zeros(1, 2, dtype=torch.float64), sigmas,
        lambda stream, step: torch.zeros(1, 2), variances=variances, corrector_steps=0,
    )  # fmt: skip
    assert x[0].tolist() == pytest.approx([mean] * 2, abs=6e-9)


@pytest.mark.parametrize(("schedule", "order", "snr", "denoise", "variance"), [
    (exact.COURSE, "predictor_first", 0.15, False, 0.2556263),
    (exact.SONG, "corrector_first", 0.16, True, 0.2529011),
    (exact.SONG, "corrector_first", 0.16, False, 0.2549160),
], ids=["course", "song-mean", "song-noisy"])  # fmt: skip
@pytest.mark.parametrize("noise_norm", ["drawn", "expected"])
def test_tutorials_predictor_corrector(schedule, order, snr, denoise, variance, noise_norm):
    sigmas, variances, start = tutorial(schedule, 500)
    found = Sphere(exact.Gaussian(mean=0.5, spread=0.5), start).variance(
        sigmas, variances=variances, order=order, snr=snr, denoise=denoise, noise_norm=noise_norm
    )
    assert found == pytest.approx(variance, abs=6e-8)


@pytest.mark.parametrize(("snr", "settled"), [(0.15, 1.0225), (0.16, 1.0256), (0.075, 1.005625)])
def test_the_corrector_alone_settles_at_one_plus_snr_squared(snr, settled):
    data, sigma = exact.Gaussian(spread=0.5), 0.7
    options = {"predictor": "none", "corrector_steps": 1500, "snr": snr, "denoise": False}
    found = Sphere(data, 3.0).variance([sigma], **options)
    assert found / (0.25 + sigma**2) == pytest.approx(settled, rel=1e-9)


@pytest.mark.parametrize("rho", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("snr", [0.15, 0.16])
def test_one_step_of_the_corrector(rho, snr):
    """Variance rho p's own becomes rho - 4 snr^2 + (4 snr^4 + 4 snr^2) / rho times p's own."""
    data, sigma = exact.Gaussian(spread=0.5), 0.7
    v = 0.25 + sigma**2
    options = {"predictor": "none", "snr": snr, "denoise": False}
    found = Sphere(data, rho * v).variance([sigma], **options)
    expected = rho - 4 * snr**2 + 4 * (snr**4 + snr**2) / rho
    assert found / v == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("epsilon", "snr"), [
    (6.2e-6, 0.17607), (3.3e-6, 0.12845), (1.8e-6, 0.09487), (2e-5, 0.31623),
])  # fmt: skip
def test_snr_of_the_released_step_sizes(epsilon, snr):
    assert annealed_snr(epsilon, 0.01) == pytest.approx(snr, abs=6e-6)


def test_annealed_corrector_alone_is_annealed_langevin_dynamics():
    data, sigmas, epsilon, t = exact.Gaussian(), np.geomspace(3.0, 0.1, 5), 4e-3, 3
    draws = [exact.normals(2, 1, 3, 3, seed=k) for k in range(5 * t)]
    program = annealed_langevin(sigmas, epsilon, t, denoise=False)
    start = exact.normals(2, 1, 3, 3, seed=99)
    chains = Chains(x=start.clone(), seed=0, samples=torch.arange(2))

    def network(x, k):
        sigma = torch.full((len(x),), program.sigma[k])
        return (program.sigma[k] * data.score(x, sigma)).float()

    expected = run(program, network, chains, update=InjectedNoise(lambda stream, k: draws[k]))
    found, nfe = predictor_corrector(
        data.score, start, sigmas, lambda stream, k: draws[k], predictor="none",
        corrector="annealed", corrector_steps=t, snr=annealed_snr(epsilon, 0.1), denoise=False,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert nfe.tolist() == [5 * t] * 2


def test_langevin_step_by_hand():
    score = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    noise = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    own = langevin_step(score, noise, 0.1, "sample")
    assert own.tolist() == pytest.approx([2 * (0.1 * 2 / 5) ** 2, 2 * 0.1**2])
    batch = langevin_step(score, noise, 0.1, "batch")
    assert batch.tolist() == pytest.approx([2 * (0.1 * 1.5 / 3) ** 2] * 2)
    expected = langevin_step(score, noise, 0.1, "sample", expected=True)
    assert expected.tolist() == pytest.approx([2 * 2 * (0.1 / 5) ** 2, 2 * 2 * 0.1**2])


def spy(score, events):
    def called(x, sigma):
        events.append(float(sigma[0]))
        return score(x, sigma)

    return called


@pytest.mark.parametrize(("order", "streams"), [
    ("corrector_first", [4, 4, 0]), ("predictor_first", [0, 4, 4]),
])  # fmt: skip
def test_order_levels_streams_and_steps(order, streams):
    levels, drawn, seen = [], [], []

    def draw(stream, step):
        drawn.append((int(stream), step))
        return exact.normals(2, 3, seed=step)

    sigmas = [2.0, 1.0, 0.5]
    x, nfe = predictor_corrector(
        spy(exact.Gaussian().score, levels), torch.zeros(2, 3), sigmas, draw, order=order,
        corrector_steps=2, on_level=lambda k, sigma, x: seen.append((k, x.clone())), denoise=False,
    )  # fmt: skip
    assert levels == [s for s in sigmas for _ in range(3)]
    assert drawn == [(stream, k) for k, stream in enumerate(streams * 3)]
    assert [k for k, _ in seen] == [3, 6, 9]
    assert torch.equal(seen[-1][1], x)
    assert nfe.tolist() == [9, 9]
    assert evaluations(3, "ancestral", 2) == 9
    assert evaluations(3, "none", 2) == 6


def test_the_last_prediction_denoises():
    data, sigma = exact.Gaussian(), 0.2
    x = exact.normals(3, 1, 4, 4)
    found, _ = predictor_corrector(
        data.score, x, [sigma], contract_noise(0, torch.arange(3), (1, 4, 4)), corrector_steps=0
    )
    level = torch.full((3,), sigma)
    torch.testing.assert_close(found, x + per_sample(level**2, x) * data.score(x, level))


@pytest.mark.parametrize("norm", ["batch", "sample"])
def test_whose_norms(norm):
    """With its own norms a sample is the same in any batch; with the batch's it is not."""
    data, sigmas, samples = exact.Gaussian(), np.geomspace(5.0, 0.1, 6), torch.tensor([3, 9, 4])
    x = 5 * contract_noise(7, samples, (1, 3, 3))(Stream.INITIAL, 0)

    def sampled(rows):
        draw = contract_noise(7, samples[rows], (1, 3, 3))
        return predictor_corrector(data.score, x[rows], sigmas, draw, norm=norm).x

    together = sampled(torch.arange(3))
    alone = torch.cat([sampled(torch.tensor([row])) for row in range(3)])
    assert torch.equal(together, alone) == (norm == "sample")
    assert together.dtype == torch.float32


def test_drawn_moments():
    data, shape = exact.Gaussian(mean=0.3, spread=0.25), (1, 32, 64)
    draw = contract_noise(5, torch.arange(8), shape)
    start = 50 * draw(Stream.INITIAL, 0)
    x, _ = predictor_corrector(data.score, start, np.geomspace(50.0, 0.01, 300), draw)
    expected = chain(300, 0.0625)
    assert float(x.var()) == pytest.approx(expected, rel=4.5 * math.sqrt(2 / x.numel()))
    assert float(x.mean()) == pytest.approx(0.3, abs=4.5 * math.sqrt(expected / x.numel()) + 1e-3)


def test_nothing_to_do():
    x = exact.normals(2, 3)
    found, nfe = predictor_corrector(
        exact.Gaussian().score, x, [1.0], lambda *_: x, predictor="none", corrector_steps=0
    )
    assert torch.equal(found, x)
    assert nfe.tolist() == [0, 0]
    none, nfe = predictor_corrector(
        exact.Gaussian().score, x[:0], [1.0, 0.5], lambda *_: x[:0], norm="sample"
    )
    assert none.shape == (0, 3)
    assert nfe.shape == (0,)


@pytest.mark.parametrize(("options", "message"), [
    ({"predictor": "euler"}, "predictor must be one of"), ({"corrector": "x"}, "corrector must"),
    ({"order": "x"}, "order must"), ({"norm": "x"}, "norm must"), ({"snr": 0.0}, "snr"),
    ({"noise_norm": "x"}, "noise_norm must"), ({"corrector_steps": -1}, "corrector_steps"),
    ({"variances": [1.0]}, r"variances must be \(2,\)"), ({"sigmas": [1.0, 2.0]}, "descending"),
    ({"variances": [1.0, -1.0]}, "negative"),
])  # fmt: skip
def test_refuses(options, message):
    options = {"sigmas": [2.0, 1.0], **options}
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=message):
        predictor_corrector(exact.Gaussian().score, x, draw=lambda *_: x, **options)


@pytest.mark.parametrize("order", ["corrector_first", "predictor_first"])
def test_what_is_known_is_imposed_at_the_noise_of_each_state(order):
    """At the start, after every update, and without noise at the end, each with its own noise."""
    seen = []

    def constrain(x, sigma, step):
        seen.append((sigma, step))
        return torch.where(torch.arange(4) < 2, sigma + torch.ones_like(x), x)

    data = exact.Gaussian()
    options = {"order": order, "corrector_steps": 2, "constrain": constrain}
    z = contract_noise(0, torch.arange(3), (4,))
    ladder = [2.0, 1.0, 0.5]
    out = predictor_corrector(data.score, exact.normals(3, 4), ladder, z, **options).x
    first = [(s, s, e) for s, e in zip(ladder, [1.0, 0.5, 0.0], strict=True)]
    if order == "predictor_first":
        first = [(e, s, s) for s, _, e in first]
    levels = [2.0, *(sigma for level in first for sigma in level), 0.0]
    assert seen == list(zip(levels, [*range(10), 9], strict=True))
    assert torch.equal(out[:, :2], torch.ones(3, 2))

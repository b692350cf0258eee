"""ULA, MALA and HMC as correctors: which law they keep, their noise, and what they cost."""

import math

import exact
import numpy as np
import pytest
import torch
from scipy.stats import chi2, norm

from ncsn_fast import ops
from ncsn_fast.ops import noise
from ncsn_fast.ops.noise import Stream
from ncsn_fast.samplers.correctors import CORRECTORS, HMC, MALA, ULA
from ncsn_fast.samplers.predictor_corrector import evaluations, predictor_corrector
from ncsn_fast.samplers.procedure import contract_noise, per_sample

moves = pytest.mark.parametrize("move", CORRECTORS.values(), ids=CORRECTORS)
TAIL = 1e-5  # chance of a band to be left, per test; the seeds are fixed


def unused(stream, step):
    raise AssertionError("nothing but the corrector draws here")


def alone(score, x, sigmas, corrector, **options):
    options = {"predictor": "none", "denoise": False, **options}
    return predictor_corrector(score, x, sigmas, unused, corrector=corrector, **options)


def in_band(x, variance):
    """Is the variance of the Gaussian draws x, whose mean is 0, this one?"""
    ratio = float(x.double().square().sum()) / variance
    low, high = chi2.ppf([TAIL / 2, 1 - TAIL / 2], x.numel())
    return low <= ratio <= high


@pytest.mark.parametrize("sigma", [3.0, 0.5, 0.02])
@moves
def test_exact_draws_stay_exact_but_with_ula(move, sigma):
    """N(0, s^2 + sigma^2) under 40 moves of h = sigma: ULA's variance follows its recursion."""
    data, n, d = exact.Gaussian(mean=0.0, spread=0.5), 16_384, 4
    v = 0.5**2 + sigma**2
    x = math.sqrt(v) * exact.normals(n, d)
    found, _ = alone(data.score, x, [sigma], move(7, torch.arange(n), 1.0), corrector_steps=40)
    expected = v
    if move is ULA:
        for _ in range(40):
            expected = (1 - sigma**2 / (2 * v)) ** 2 * expected + sigma**2
        assert in_band(found, v) == (sigma == 0.02)  # h is too small there to move the chains
    assert in_band(found, expected)


@pytest.mark.parametrize("move", [MALA, HMC])
def test_annealed_chains_end_at_the_law_of_the_last_level(move):
    """From N(0, sigma_1^2) to N(0, s^2 + sigma_L^2); langevin's variance is too large there."""
    data, n, sigmas = exact.Gaussian(mean=0.0, spread=0.5), 8192, np.geomspace(3.0, 0.3, 8)
    x, samples = 3 * exact.normals(n, 4), torch.arange(n)
    expected = 0.5**2 + 0.3**2
    found, _ = alone(data.score, x, sigmas, move(1, samples, 1.0), corrector_steps=20)
    assert in_band(found, expected)
    published, _ = predictor_corrector(
        data.score, x, sigmas, contract_noise(1, samples, (4,)), predictor="none", snr=0.4,
        corrector_steps=20, denoise=False,
    )  # fmt: skip
    assert not in_band(published, expected)
    assert float(published.var()) > (1 + 0.4**2 / 2) * expected


@pytest.mark.parametrize("move", [MALA, HMC])
def test_it_mends_what_the_predictor_did_wrong(move):
    """Coarse steps of the flow leave too large a variance; corrected at sigma_L, it is right."""
    data, n, sigmas = exact.Gaussian(mean=0.0, spread=0.5), 8192, np.geomspace(20.0, 0.5, 10)
    samples = torch.arange(n)
    draw = contract_noise(2, samples, (4,))
    x = 20 * draw(Stream.INITIAL, 0)
    options = {"predictor": "flow", "order": "predictor_first", "denoise": False}
    bare, _ = predictor_corrector(data.score, x, sigmas, draw, corrector_steps=0, **options)
    assert float(bare.var()) > 1.5 * 0.5**2
    mended, _ = predictor_corrector(
        data.score, x, sigmas, draw, corrector=move(2, samples, 1.0), corrector_steps=12, **options
    )
    assert in_band(mended, 0.5**2 + 0.5**2)


class Modes:
    """.7 N(1.5, .6^2) + .3 N(-1.5, .6^2) in every element, smoothed by noise sigma."""

    def parts(self, x, sigma):
        variance = 0.36 + sigma**2
        gaps = torch.stack((1.5 - x, -1.5 - x))
        weights = torch.tensor([0.7, 0.3], dtype=x.dtype).log().reshape(2, *[1] * x.ndim)
        return weights - gaps.square() / (2 * variance), gaps, variance

    def score(self, x, sigma):
        logits, gaps, variance = self.parts(x, per_sample(sigma, x))
        return (logits.softmax(0) * gaps).sum(0) / variance

    def draw(self, n, sigma):
        u = torch.rand(n, 1, generator=torch.Generator().manual_seed(5))
        return torch.where(u < 0.7, 1.5, -1.5) + math.hypot(0.6, sigma) * exact.normals(n, 1)


@pytest.mark.parametrize(("move", "exactly"), [(ULA, False), (MALA, True), (HMC, True)])
def test_a_mixture_is_kept(move, exactly):
    """Mass above 0 and both moments, in one dimension where scores are gradients."""
    data, sigma, n = Modes(), 0.4, 65_536
    options = {} if move is ULA else {"n_points": 12}
    corrector = move(3, torch.arange(n), 1.6, 4, **options)
    x, _ = alone(data.score, data.draw(n, sigma), [sigma], corrector, corrector_steps=8)
    x, s = x.double().flatten(), math.hypot(0.6, sigma)
    above = 0.7 * norm.cdf(1.5 / s) + 0.3 * norm.cdf(-1.5 / s)
    mean, variance = 1.5 * 0.4, s**2 + 1.5**2 * (1 - 0.4**2)
    band = 4.5 / math.sqrt(n)
    off = [
        abs(float((x > 0).double().mean()) - above) / math.sqrt(above * (1 - above)),
        abs(float(x.mean()) - mean) / math.sqrt(variance),
        abs(float((x - mean).square().mean()) - variance) / float((x - mean).square().std()),
    ]
    assert (max(off) < band) == exactly


@pytest.mark.parametrize(("move", "acceptance"), [(MALA, 0.574), (HMC, 0.651)])
@pytest.mark.parametrize("d", [784, 3072])
def test_default_steps_accept_as_theory_has_it(move, acceptance, d):
    """On N(0, sigma^2 I) of many elements; HMC's length here is nearly its least favourable."""
    point, sigma, n, seen = exact.Gaussian(mean=0.0, spread=0.0), 0.3, 256, []
    corrector = move(4, torch.arange(n), n_steps=6, on_move=lambda s, r: seen.append((s, r)))
    if move is HMC:
        h = corrector.default_step(d)
        n_leapfrog = round(math.pi / 2 / (2 * math.asin(h / 2)))
        corrector = HMC(4, torch.arange(n), n_steps=6, n_leapfrog=n_leapfrog,
                        on_move=corrector.on_move)  # fmt: skip
    alone(point.score, sigma * exact.normals(n, d), [sigma], corrector)
    ((at, result),) = seen
    assert at == sigma
    assert float(result.acceptance.mean()) == pytest.approx(acceptance, abs=0.025)
    assert int(result.nonfinite.sum()) == 0


def test_ula_is_the_annealed_corrector():
    """h = 2 snr sigma, and the same normals: those of stream 0 for both."""
    data, sigmas, samples, shape = exact.Gaussian(), [2.0, 0.7], torch.tensor([5, 2]), (1, 3, 3)
    start = exact.normals(2, *shape)
    options = {"predictor": "none", "corrector_steps": 3, "denoise": False}
    ours, nfe = predictor_corrector(
        data.score, start, sigmas, unused, corrector=ULA(9, samples), **options
    )
    published, _ = predictor_corrector(
        data.score, start, sigmas, lambda stream, k: noise.normal(9, samples, 0, k, shape),
        corrector="annealed", snr=0.16, **options,
    )  # fmt: skip
    torch.testing.assert_close(ours, published, rtol=1e-5, atol=1e-6)
    assert nfe.tolist() == [6, 6]


@pytest.mark.parametrize(("corrector", "nfe"), [
    (ULA(0, torch.arange(3)), 1), (ULA(0, torch.arange(3), n_steps=4), 4),
    (MALA(0, torch.arange(3)), 3), (MALA(0, torch.arange(3), n_steps=4, n_points=2), 5),
    (HMC(0, torch.arange(3)), 7), (HMC(0, torch.arange(3), 0.1, 2, n_leapfrog=3, n_points=5), 13),
], ids=["ula", "ula-4", "mala", "mala-4", "hmc", "hmc-2"])  # fmt: skip
def test_evaluations(corrector, nfe):
    data = exact.Gaussian()
    _, found = predictor_corrector(
        data.score, exact.normals(3, 5), [1.0, 0.5], lambda *_: exact.normals(3, 5),
        corrector=corrector, corrector_steps=2,
    )  # fmt: skip
    assert corrector.nfe == nfe
    assert found.tolist() == [data.calls] * 3 == [2 * (2 * nfe + 1)] * 3
    assert evaluations(2, "ancestral", 2, corrector.nfe) == data.calls


@moves
@pytest.mark.parametrize("order", ["corrector_first", "predictor_first"])
def test_no_number_is_drawn_twice(move, order, monkeypatch):
    drawn = []

    def spied(function, name):
        def called(seed, samples, stream, step, shape):
            drawn.append((name, int(stream), step))
            return function(seed, samples, stream, step, shape)

        return called

    samples = torch.arange(2)
    monkeypatch.setattr(ops, "normal", spied(ops.normal, "words"))
    monkeypatch.setattr(ops, "uniform", spied(ops.uniform, "words"))  # of the same words
    predictor_corrector(
        exact.Gaussian().score, exact.normals(2, 3), [2.0, 1.0, 0.5],
        contract_noise(0, samples, (3,)), corrector=move(0, samples, n_steps=3), corrector_steps=2,
        order=order,
    )  # fmt: skip
    assert len(drawn) == len(set(drawn)) == 3 + 3 * 2 * 3 * (1 if move is ULA else 2)


@moves
def test_a_sample_does_not_know_its_batch(move):
    data, sigmas, samples = exact.Gaussian(), np.geomspace(5.0, 0.1, 4), torch.tensor([3, 9, 4])
    x = 5 * contract_noise(7, samples, (1, 3, 3))(Stream.INITIAL, 0)

    def sampled(rows):
        draw = contract_noise(7, samples[rows], (1, 3, 3))
        corrector = move(7, samples[rows], n_steps=2)
        return predictor_corrector(data.score, x[rows], sigmas, draw, corrector=corrector).x

    together = sampled(torch.arange(3))
    alone = torch.cat([sampled(torch.tensor([row])) for row in range(3)])
    assert together.dtype == torch.float32
    assert torch.equal(together, alone)


def test_steps_scale_with_sigma_and_dimensions():
    samples = torch.arange(1)
    sizes = {}
    for name, move in CORRECTORS.items():
        seen = []
        corrector = move(0, samples, on_move=lambda s, r, seen=seen: seen.append((s, r)))
        alone(exact.Gaussian().score, exact.normals(1, 3, 8, 8), [2.0, 0.5], corrector)
        assert [s for s, _ in seen] == [2.0, 0.5]
        ratios = [float(result.step_size) / s for s, result in seen]
        assert ratios[0] == pytest.approx(ratios[1], rel=1e-12)
        sizes[name] = ratios[0]
    assert sizes["ula"] == pytest.approx(2 * 0.16)
    assert sizes["mala"] == pytest.approx(1.65 * 192 ** (-1 / 6))
    assert sizes["hmc"] == pytest.approx(1.90 * 192**-0.25)


def test_no_states():
    for move in CORRECTORS.values():
        x, nfe = alone(exact.Gaussian().score, torch.zeros(0, 3), [1.0], move(0, torch.arange(0)))
        assert (x.shape, nfe.shape) == ((0, 3), (0,))


@pytest.mark.parametrize(("call", "message"), [
    (lambda s: ULA(2**32, s), "seed must be in"), (lambda s: MALA(0, s, 0.0), "got 0.0"),
    (lambda s: HMC(0, s, math.inf), "relative_step must be positive and finite; got inf"),
    (lambda s: ULA(0, s, n_steps=0), "n_steps must be at least 1; got 0"),
    (lambda s: HMC(0, s, n_leapfrog=0), "n_leapfrog >= 1 .* got 0 and 3"),
    (lambda s: MALA(0, s, n_points=1), "n_points >= 2 .* got 1 and 1"),
])  # fmt: skip
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.arange(2))


def test_refuses_states_of_other_samples_and_scores_that_are_not_finite():
    x = exact.normals(3, 4)
    with pytest.raises(ValueError, match=r"samples must be \(3,\); got \(2,\)"):
        alone(exact.Gaussian().score, x, [1.0], MALA(0, torch.arange(2)))
    x[1, 2] = math.nan
    with pytest.raises(ValueError, match="chain 1 starts where score"):
        alone(exact.Gaussian().score, x, [1.0], MALA(0, torch.arange(3)))

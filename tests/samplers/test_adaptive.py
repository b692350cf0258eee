"""The adaptive solver beside a plain statement of it for one sample, and exact moments."""

import math

import exact
import numpy as np
import pytest
import torch

from ncsn_fast.ops.noise import Stream
from ncsn_fast.samplers.adaptive import adaptive
from ncsn_fast.samplers.procedure import SolverError, contract_noise

LOW, HIGH = 0.01, 50.0


def one_sample(score, x, draw, *, rtol, atol=1 / 256, t_end=1e-5, h=0.01):
    """One sample by the paper's loop in NumPy: state, evaluations, accepted and rejected steps.

    Args:
        score: (x, sigma) -> score of a vector.   draw: number of the attempt -> normals.
    """
    rate = math.log(HIGH / LOW)

    def sigma(t):
        return LOW * math.exp(rate * t)

    def step(x, t, z):
        g = sigma(t) * math.sqrt(2 * rate)
        return h * g**2 * score(x, sigma(t)) + g * math.sqrt(h) * z

    t, previous, attempts, accepted = 1.0, x, 0, 0
    while t - t_end >= 1e-6:
        z = draw(attempts)
        first = step(x, t, z)
        second = step(x + first, t - h, z)
        allowed = np.maximum(atol, rtol * np.maximum(abs(previous), abs(x + first)))
        error = math.sqrt(np.mean(((second - first) / 2 / allowed) ** 2))
        attempts += 1
        if error <= 1:
            x, previous, t = x + (first + second) / 2, x + first, t - h
            accepted += 1
        h = min(t - t_end, 0.9 * h * error**-0.9)
    end = sigma(t_end)
    return x + end**2 * score(x, end), 2 * attempts + 1, accepted, attempts - accepted


def mixture(x, sigma):
    """Score of two modes at -1 and 1 in every element, of spread 0.1: not linear."""
    variance = 0.1**2 + sigma**2
    return (np.tanh(x / variance) - x) / variance


def mixture_score(x, sigma):
    variance = (0.1**2 + sigma**2)[:, None]
    return (torch.tanh(x / variance) - x) / variance


@pytest.mark.parametrize("rtol", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("compact", [True, False])
def test_each_sample_takes_the_papers_steps(rtol, compact):
    n, d, samples = 5, 7, torch.tensor([4, 0, 19, 2, 3])
    draw = contract_noise(11, samples, (d,))
    start = HIGH * draw(Stream.INITIAL, 0).double()
    found = adaptive(mixture_score, start, LOW, HIGH, draw, rtol=rtol, compact=compact)
    rejections = 0
    for row in range(n):
        x, nfe, _, rejected = one_sample(
            mixture, start[row].numpy(),
            lambda k, row=row: draw(Stream.SAMPLER, k)[row].double().numpy(), rtol=rtol,
        )  # fmt: skip
        assert int(found.nfe[row]) == nfe
        np.testing.assert_allclose(found.x[row].numpy(), x, rtol=1e-6, atol=1e-8)
        rejections += rejected
    assert rejections > 0
    assert len(set(found.nfe.tolist())) > 1


def sampled(data, samples, shape, **options):
    draw = contract_noise(3, samples, shape)
    return adaptive(data.score, HIGH * draw(Stream.INITIAL, 0), LOW, HIGH, draw, **options)


def test_a_sample_does_not_know_its_batch():
    data, samples = exact.Gaussian(), torch.tensor([8, 1, 5])
    together = sampled(data, samples, (1, 3, 3))
    assert together.x.dtype == torch.float32
    for row in range(3):
        alone = sampled(data, samples[row : row + 1], (1, 3, 3))
        assert torch.equal(alone.x[0], together.x[row])
        assert alone.nfe[0] == together.nfe[row]


def test_compaction_saves_evaluations_and_changes_nothing():
    sizes = {True: [], False: []}
    results = {}
    for compact, seen in sizes.items():
        draw = contract_noise(3, torch.arange(16), (4,))

        def score(x, sigma, seen=seen):
            seen.append(len(x))
            return mixture_score(x, sigma)

        start = HIGH * draw(Stream.INITIAL, 0)
        results[compact] = adaptive(score, start, LOW, HIGH, draw, compact=compact)
    assert torch.equal(results[True].x, results[False].x)
    assert torch.equal(results[True].nfe, results[False].nfe)
    assert sum(sizes[True]) == int(results[True].nfe.sum())  # none wasted
    assert set(sizes[False]) == {16}
    assert sum(sizes[False]) == 16 * int(results[False].nfe.max())


@pytest.mark.parametrize(("rtol", "atol", "band"), [(0.001, 5e-4, 0.03), (0.02, 1 / 256, 0.12)])
def test_moments_of_gaussian_data(rtol, atol, band):
    """Tight tolerances end at the data's moments; the published ones near them."""
    data = exact.Gaussian(mean=0.3, spread=0.25)
    x, _ = sampled(data, torch.arange(8), (1, 32, 32), rtol=rtol, atol=atol)
    assert float(x.var()) == pytest.approx(0.25**2, rel=band)
    assert float(x.mean()) == pytest.approx(0.3, abs=0.02)


def test_looser_tolerances_take_fewer_evaluations():
    data = exact.Gaussian(mean=0.5, spread=0.25)
    nfe = [
        float(sampled(data, torch.arange(4), (3, 16, 16), rtol=rtol).nfe.double().mean())
        for rtol in (0.01, 0.02, 0.05, 0.1)
    ]
    assert nfe == sorted(nfe, reverse=True)
    assert 100 < nfe[3] < 0.5 * nfe[0] < 1000


def test_denoising_is_one_evaluation_at_the_end():
    data, samples = exact.Gaussian(), torch.arange(2)
    noisy = sampled(data, samples, (5,), denoise=False)
    clean = sampled(data, samples, (5,))
    sigma = LOW * (HIGH / LOW) ** 1e-5
    shrink = data.spread**2 / (data.spread**2 + sigma**2)
    torch.testing.assert_close(clean.x, data.mean + shrink * (noisy.x - data.mean))
    assert torch.equal(clean.nfe, noisy.nfe + 1)


def test_empty_batch():
    none = sampled(exact.Gaussian(), torch.zeros(0, dtype=torch.int64), (1, 2, 2))
    assert none.x.shape == (0, 1, 2, 2)
    assert none.nfe.shape == (0,)


@pytest.mark.parametrize("compact", [True, False])
def test_errors_say_where_it_stopped(compact):
    data = exact.Gaussian()
    with pytest.raises(SolverError, match=r"max_steps=5 .*: 3 samples, the first of them row 0"):
        sampled(data, torch.arange(3), (4,), max_steps=5, compact=compact)

    def broken(x, sigma):
        return torch.where(
            x[:, :1].isnan() | (sigma < 1.0)[:, None], math.nan, data.score(x, sigma)
        )

    draw = contract_noise(0, torch.arange(2), (4,))
    with pytest.raises(SolverError, match="no longer finite"):
        adaptive(broken, HIGH * draw(Stream.INITIAL, 0), LOW, HIGH, draw, compact=compact)


@pytest.mark.parametrize(("options", "message"), [
    ({"rtol": -1.0}, "rtol"), ({"atol": 0.0}, "atol"), ({"t_end": 1.0}, "t_end"),
    ({"first_step": 0.0}, "first_step"), ({"max_steps": 0}, "max_steps"),
])  # fmt: skip
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        sampled(exact.Gaussian(), torch.arange(1), (4,), **options)
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        adaptive(exact.Gaussian().score, torch.zeros(1, 2), 1.0, 0.5, lambda *_: torch.zeros(1, 2))

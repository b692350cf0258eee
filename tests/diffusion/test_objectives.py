"""Denoising score matching: golden values, and closed forms on Gaussian data."""

import math

import golden
import numpy as np
import pytest
import torch

from ncsn_fast.diffusion.objectives import denoising_score_matching, random_levels

# Data N(m, s^2 I) in D dimensions and the score -(x - a) / b^2.
D, M, S, A, SIGMA = 3, 0.3, 0.8, 0.1, 0.5
N = 200_000


@pytest.mark.parametrize("index", [0, 1])
def test_golden_losses(index):
    meta, arrays = golden.read("dsm_loss")
    model, size = golden.model(meta), meta["image_size"]
    shape = (meta["batch"], meta["channels"], size, size)
    x = golden.uniform(meta["x_seed"], *shape)
    noise = np.random.RandomState(meta["noise_seed"]).standard_normal(shape)
    losses = denoising_score_matching(
        model.score_at,
        x,
        model.sigmas,
        torch.tensor(meta["labels"]),
        torch.from_numpy(noise.astype(np.float32)),
        anneal_power=meta["anneal_power"][index],
    )
    assert losses.shape == (meta["batch"],)
    assert losses.mean().item() == pytest.approx(arrays["output"][index], rel=golden.TOLERANCE)


def closed_form(a, b):
    """DSM of the linear score, per sample."""
    fit = (S**2 + (M - a) ** 2) / b**4 + (1 / SIGMA - SIGMA / b**2) ** 2
    return 0.5 * D * fit


def monte_carlo(a, b, power, seed=0):
    """Mean loss on N draws, and its standard error."""
    generator = torch.Generator().manual_seed(seed)
    x = M + S * torch.randn(N, D, 1, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(N, D, 1, 1, generator=generator, dtype=torch.float64)
    losses = denoising_score_matching(
        lambda y, level: -(y - a) / b**2,
        x,
        torch.tensor([9.0, SIGMA], dtype=torch.float64),
        torch.ones(N, dtype=torch.int64),
        noise,
        anneal_power=power,
    ).double()
    return losses.mean().item(), losses.std().item() / math.sqrt(N)


BEST = math.sqrt(S**2 + SIGMA**2)


@pytest.mark.parametrize(
    ("a", "b", "power", "expected"),
    [
        (A, 1.2, 0.0, 4.58940972),
        (M, BEST, 0.0, 4.31460674),
        (M, BEST, 2.0, 1.07865169),
        (A, 1.2, 1.0, 4.58940972 * SIGMA),
    ],
)
def test_gaussian_closed_form(a, b, power, expected):
    assert closed_form(a, b) * SIGMA**power == pytest.approx(expected, rel=1e-8)
    mean, error = monte_carlo(a, b, power)
    assert abs(mean - expected) < 4.5 * error
    assert error < 0.005 * expected  # the band is narrow enough to tell these cases apart


def test_the_true_score_of_the_noisy_data_is_the_minimum():
    best, _ = monte_carlo(M, BEST, 2.0)
    for a, b in ((M + 0.1, BEST), (M - 0.1, BEST), (M, BEST * 1.1), (M, BEST / 1.1)):
        assert monte_carlo(a, b, 2.0)[0] > best  # same draws


def test_levels_of_a_batch_are_their_own():
    """Each sample sees the sigma of its level, and no other's."""
    sigmas = torch.tensor([3.0, 0.7, 0.1])
    x, noise = torch.randn(2, 4, 2, 3, 5, generator=torch.Generator().manual_seed(1)).unbind()
    level = torch.tensor([2, 0, 1, 2])

    def score_at(y, k):
        return -y / (1 + sigmas[k].square()[:, None, None, None])

    together = denoising_score_matching(score_at, x, sigmas, level, noise)
    for i in range(4):
        sigma = float(sigmas[level[i]])
        target = -noise[i] / sigma
        score = -(x[i] + sigma * noise[i]) / (1 + sigma**2)
        expected = 0.5 * sigma**2 * (score - target).square().sum()
        torch.testing.assert_close(together[i], expected, rtol=1e-4, atol=1e-5)


def test_random_levels_are_uniform_and_reproducible():
    draw = random_levels(60_000, 6, torch.Generator().manual_seed(3))
    assert torch.equal(draw, random_levels(60_000, 6, torch.Generator().manual_seed(3)))
    counts = torch.bincount(draw, minlength=6).double()
    assert len(counts) == 6
    chi_square = float(((counts - 10_000).square() / 10_000).sum())
    assert chi_square < 25.7  # 1e-4 quantile for 5 degrees of freedom

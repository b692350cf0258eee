"""Printed figures of score matching, to their last digit: expectations as finite sums.

Data N(m, s^2 I) and the score -(x - a) / b^2 make every loss a polynomial in x and the noise, so
that its mean over the nodes of a quadrature is its expectation: signs for the second moments, three
nodes of Gauss and Hermite for the fourth.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from ncsn_fast.diffusion import objectives
from ncsn_fast.diffusion.objectives import continuous_score_matching
from ncsn_fast.diffusion.sde import VE
from ncsn_fast.models.architectures import VERSIONS
from ncsn_fast.models.unet import Clock

D, M, S, A, B, SIGMA = 3, 0.3, 0.8, 0.1, 1.2, 0.5
SIGNS = [(-1.0, 0.5), (1.0, 0.5)]  # nodes and weights: exact to degree 3
HERMITE = [(-math.sqrt(3), 1 / 6), (0.0, 2 / 3), (math.sqrt(3), 1 / 6)]  # to degree 5


def grid(nodes, dimensions):
    """Points (K, dimensions) that stand for N(0, I), and their weights (K,)."""
    points = list(itertools.product(nodes, repeat=dimensions))
    z = torch.tensor([[node for node, _ in point] for point in points], dtype=torch.float64)
    weights = [math.prod(weight for _, weight in point) for point in points]
    return z, torch.tensor(weights, dtype=torch.float64)


def linear(a=A, b=B):
    return lambda x: -(x - a) / b**2


def mean(losses, weights):
    return float((losses.detach() * weights).sum())


@pytest.mark.parametrize(("a", "b", "explicit", "implicit"), [
    (A, B, 0.75231481, -1.59143519),
    (M, S, 0.0, -D / (2 * S**2)),  # the minimum
])  # fmt: skip
def test_explicit_and_implicit(a, b, explicit, implicit):
    z, weights = grid(SIGNS, D)
    x = M + S * z
    assert mean(objectives.explicit(linear(a, b), x, linear(M, S)(x)), weights) == pytest.approx(
        explicit, abs=5e-9
    )
    assert mean(objectives.implicit(linear(a, b), x), weights) == pytest.approx(implicit, abs=5e-9)
    gap = 0.5 * mean(linear(M, S)(x).square().sum(1), weights)  # 1/2 E ||grad log p||^2
    assert gap == pytest.approx(2.34375, rel=1e-12)
    assert explicit - implicit == pytest.approx(gap, abs=1e-8)


def test_denoising():
    z, weights = grid(SIGNS, 2 * D)
    x, noise = M + S * z[:, :D], z[:, D:]
    found = objectives.denoising(linear(), x, SIGMA, noise)
    assert mean(found, weights) == pytest.approx(4.58940972, abs=5e-9)
    smoothed = objectives.implicit(linear(), x + SIGMA * noise)
    assert mean(found - smoothed, weights) == pytest.approx(D / (2 * SIGMA**2), rel=1e-12)
    best = objectives.denoising(linear(M, math.hypot(S, SIGMA)), x, SIGMA, noise)
    assert mean(best, weights) == pytest.approx(4.31460674, abs=5e-9)
    level = torch.zeros(len(x), dtype=torch.int64)
    weighted = objectives.denoising_score_matching(
        lambda y, k: linear(M, math.hypot(S, SIGMA))(y), x,
        torch.tensor([SIGMA], dtype=torch.float64), level, noise,
    )  # fmt: skip
    assert mean(weighted, weights) == pytest.approx(1.07865169, abs=5e-9)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_an_energy_has_the_losses_of_its_score(shape):
    """E = ||x - a||^2 / (2 b^2), a number for each sample or a column as networks give it."""
    score = objectives.score_of(
        lambda x: ((x - A).square().sum(1) / (2 * B**2)).reshape(len(x), *shape)
    )
    z, weights = grid(SIGNS, 2 * D)
    x, noise = M + S * z[:, :D], z[:, D:]
    assert mean(objectives.explicit(score, x, linear(M, S)(x)), weights) == pytest.approx(
        0.75231481, abs=5e-9
    )
    assert mean(objectives.implicit(score, x), weights) == pytest.approx(-1.59143519, abs=5e-9)
    assert mean(objectives.denoising(score, x, SIGMA, noise), weights) == pytest.approx(
        4.58940972, abs=5e-9
    )
    slices = torch.Generator().manual_seed(0)
    reduced = objectives.sliced(score, x, variance_reduced=True, generator=slices)
    # The Jacobian is a multiple of one, so that signs are exact.
    torch.testing.assert_close(reduced, objectives.implicit(linear(), x), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("slices", "variance_reduced", "printed", "digits"), [
    ("gaussian", False, 2.49, 0.005), ("gaussian", True, 3.05, 0.005),
    # Also seen as .486, an estimate from draws; the sum below, and a closed form, have .4834.
    ("rademacher", False, 0.4834, 0.00005), ("rademacher", True, 0.161, 0.0005),
])  # fmt: skip
def test_mean_and_variance_of_one_slice(slices, variance_reduced, printed, digits, monkeypatch):
    """Over all data and all slices; 'reduced' is the greater of the two for Gaussian slices."""
    z, weights = grid(HERMITE, D)
    v, chances = grid(HERMITE if slices == "gaussian" else SIGNS, D)
    x = (M + S * z).repeat_interleave(len(v), 0)
    joint = torch.outer(weights, chances).flatten()
    monkeypatch.setattr(objectives, "random_slices", lambda *_: v.repeat(len(z), 1))
    losses = objectives.sliced(linear(), x, slices=slices, variance_reduced=variance_reduced)
    assert mean(losses, joint) == pytest.approx(-1.59143519, abs=5e-9)
    assert mean((losses + 1.59143519).square(), joint) == pytest.approx(printed, abs=digits)


def test_slices_of_length_one_would_scale_the_loss():
    """By 1 / D: why the sphere of random_slices has radius sqrt(D)."""
    v = objectives.random_slices("sphere", torch.zeros(9, 4, 5, dtype=torch.float64))
    torch.testing.assert_close(v.flatten(1).square().sum(1), torch.full((9,), 20.0).double())


SDES = {"a": VE(0.01, 22.0, "clean"), "b": VE.power(25.0)}


# These are integrals; sums over some thousand times end in .9643, .7287 and .5583.
@pytest.mark.parametrize(("version", "variance", "least"), [
    ("a", 0.25, 398.2585), ("a", 0.0625, 327.9642), ("b", 0.25, 152.7286), ("b", 0.0625, 74.5581),
])  # fmt: skip
def test_least_loss_of_the_tutorials(version, variance, least):
    """784 E[s^2 / (s^2 + std(t)^2)] over t uniform from t_min to 1; a zero network has 784."""
    row = VERSIONS[version]
    clock, sde = Clock(version, row.sigma_min, row.sigma_max), SDES[version]
    nodes, measure = np.polynomial.legendre.leggauss(400)
    t = torch.from_numpy(clock.t_min + (1 - clock.t_min) * (1 + nodes) / 2)
    std = clock.std(t)
    torch.testing.assert_close(std, sde.std(t), rtol=1e-12, atol=0)
    z, _ = grid(SIGNS, 2)  # one pixel of x and of the noise
    x = 0.5 + math.sqrt(variance) * z[:, 0].repeat(len(t)).reshape(-1, 1, 1, 1)
    noise = z[:, 1].repeat(len(t)).reshape(-1, 1, 1, 1)

    def exact(y, t):
        return -(y - 0.5) / (variance + sde.std(t).square())[:, None, None, None]

    def zero(y, t):
        return torch.zeros_like(y)

    for score, expected in ((exact, least), (zero, 784.0)):
        losses = continuous_score_matching(
            score, x, t.repeat_interleave(4), std.repeat_interleave(4), noise
        )
        by_time = losses.double().reshape(len(t), 4).mean(1)
        found = 784 * float(by_time @ torch.from_numpy(measure / 2))
        assert found == pytest.approx(expected, abs=6e-5)

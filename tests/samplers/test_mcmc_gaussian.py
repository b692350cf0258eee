"""ULA, MALA and HMC on Gaussians, where stationary laws and acceptance are closed forms."""

import math

import numpy as np
import pytest
import torch
from gaussian_chains import GAUSSIAN, GAUSSIAN_SCORE, assert_close_mean, start
from scipy.stats import f as fisher

from ncsn_fast.ops import noise
from ncsn_fast.ops.noise import Stream
from ncsn_fast.samplers.mcmc import hmc, leapfrog, mala, ula
from ncsn_fast.samplers.targets import Target


@pytest.mark.parametrize(
    ("epsilon", "variance"), [(0.1, 1.025641), (0.5, 1.142857), (1.0, 1.333333), (2.0, 2.0)]
)
def test_stationary_variance_of_ula(epsilon, variance):
    """1 / (1 - epsilon / 4) in the paper's form, 1 / (1 - alpha / 2) in the code's."""
    assert 1 / (1 - epsilon / 4) == pytest.approx(variance, abs=5e-7)
    assert 1 / (1 - (epsilon / 2) / 2) == pytest.approx(variance, abs=5e-7)
    x = start(40_000, 1, spread=math.sqrt(variance))
    end = ula(GAUSSIAN_SCORE, x, step_size=math.sqrt(epsilon), n_steps=20, seed=3)
    assert_close_mean(end.x.square(), variance)
    assert float((end.x * x).mean() / variance) == pytest.approx((1 - epsilon / 2) ** 20, abs=0.03)
    assert end.nfe == 20
    assert end.acceptance.unique().tolist() == [1.0]


@pytest.mark.parametrize("s", [1.0, 0.6])
@pytest.mark.parametrize(
    ("epsilon", "variance"), [(0.1, 1.025641), (0.5, 1.142857), (1.0, 1.333333), (2.0, 2.0)]
)
def test_fixed_point_of_ula(s, epsilon, variance):
    """On N(0, s^2), in units of s: x' = r x + h z settles at h^2 / (1 - r^2), to every digit."""
    target = Target(score=lambda x: -x / s**2)
    h = s * math.sqrt(epsilon)
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    samples = torch.zeros(2, dtype=torch.int64)  # the same noise for both
    end = ula(target, x, step_size=h, n_steps=1, samples=samples).x.flatten()
    z = noise.normal(0, samples[:1], Stream.SAMPLER, 0, (1,)).double()
    kick, shrink = float(end[0] / z), float(end[1] - end[0])
    assert kick**2 / (1 - shrink**2) / s**2 == pytest.approx(variance, abs=5e-7)


@pytest.mark.parametrize("s", [1.0, 0.6])
def test_acceptance_of_mala_in_closed_form(s):
    """log A = epsilon / (8 s^4) (||x||^2 - ||y||^2) on N(0, s^2 I), from the score alone too."""
    x, p, h = start(40, 5), start(40, 5, 1), torch.full((40,), 0.7, dtype=torch.float64)
    for target in (
        Target(log_density=lambda x: -0.5 * x.square().sum(1) / s**2),
        Target(score=lambda x: -x / s**2, n_points=2),
    ):
        here = target.at(x)
        there, q = leapfrog(target, here, p, h, 1)
        log_a = target.difference(here, there) + 0.5 * (p.square() - q.square()).sum(1)
        expected = 0.49 / (8 * s**4) * (x.square() - there.x.square()).sum(1)
        torch.testing.assert_close(log_a, expected)


def test_ula_is_the_formula_and_diverges_beyond_its_limit():
    x, epsilon = start(5, 3), 0.3
    end = ula(GAUSSIAN_SCORE, x, step_size=math.sqrt(epsilon), n_steps=2, seed=8, first_step=4)
    for k in (4, 5):
        z = noise.normal(8, torch.arange(5), Stream.SAMPLER, k, (3,))
        x = x - epsilon / 2 * x + math.sqrt(epsilon) * z
    torch.testing.assert_close(end.x, x, rtol=1e-6, atol=1e-6)
    wild = ula(GAUSSIAN_SCORE, start(5, 3), step_size=2.1, n_steps=6000)
    assert bool((wild.nonfinite > 0).all())
    calm = ula(GAUSSIAN_SCORE, start(5, 3), step_size=1.9, n_steps=300)
    assert not calm.nonfinite.any()


def mean_acceptance(d, h, n_leapfrog):
    """Mean acceptance on N(0, I_d), exactly.

    The end of a trajectory is y = cos(t) x + sin(t) / sqrt(1 - h^2 / 4) p with t = 2 n asin(h / 2),
    and log A = h^2 / 8 (||x||^2 - ||y||^2), so that by symmetry the mean of min(1, A) is twice the
    probability of ||x|| > ||y||: of a positive and a negative quadratic form in (x, p).
    """
    t = 2 * n_leapfrog * math.asin(h / 2)
    c, s = math.cos(t), math.sin(t) / math.sqrt(1 - h**2 / 4)
    low, high = np.linalg.eigvalsh([[1 - c**2, -c * s], [-c * s, -(s**2)]])
    return 2 * fisher.cdf(high / -low, d, d)


# .919 (d = 1), .841 (784) and for HMC .852 are seen too: estimates from draws.
@pytest.mark.parametrize(
    ("d", "epsilon", "printed"),
    [(1, 1.0, 0.9208), (10, 0.5, 0.8916), (100, 0.3, 0.8377), (784, 0.15, 0.8389)],
)
def test_acceptance_of_mala(d, epsilon, printed):
    h = math.sqrt(epsilon)
    expected = mean_acceptance(d, h, 1)
    assert expected == pytest.approx(printed, abs=5e-5)
    end = mala(GAUSSIAN, start(2000, d), step_size=h, n_steps=20, seed=1)
    assert_close_mean(end.acceptance, expected)
    assert_close_mean(end.accepted, expected)
    assert end.nfe == 21


@pytest.mark.parametrize(
    ("d", "h", "n_leapfrog", "printed"),
    [(100, 0.25, 10, 0.9628), (100, 0.5, 5, 0.8527), (10, 0.3, 10, 0.9964)],
)
def test_acceptance_of_hmc(d, h, n_leapfrog, printed):
    expected = mean_acceptance(d, h, n_leapfrog)
    assert expected == pytest.approx(printed, abs=5e-5)
    end = hmc(GAUSSIAN, start(2000, d), step_size=h, n_leapfrog=n_leapfrog, n_steps=20, seed=1)
    assert_close_mean(end.acceptance, expected)
    assert_close_mean(end.accepted, expected)
    assert end.nfe == 1 + 20 * n_leapfrog


def test_mala_is_the_metropolis_rule_written_out():
    """log A with both proposal densities, and its closed form for N(0, I)."""
    x, epsilon = start(64, 3, spread=2.0), 1.7
    end = mala(GAUSSIAN, x, step_size=math.sqrt(epsilon), n_steps=1, seed=5)
    z = noise.normal(5, torch.arange(64), Stream.SAMPLER, 0, (3,))
    u = noise.uniform(5, torch.arange(64), Stream.CORRECTOR, 0, (1,)).flatten()
    y = x - epsilon / 2 * x + math.sqrt(epsilon) * z
    forth = (y - x + epsilon / 2 * x).square().sum(1)
    back = (x - y + epsilon / 2 * y).square().sum(1)
    log_a = 0.5 * (x.square() - y.square()).sum(1) + (forth - back) / (2 * epsilon)
    closed = epsilon / 8 * (x.square() - y.square()).sum(1)
    torch.testing.assert_close(log_a, closed)
    torch.testing.assert_close(end.acceptance, log_a.clamp(max=0).exp(), rtol=1e-5, atol=1e-6)
    yes = u.log() < log_a
    assert 5 < int(yes.sum()) < 59
    torch.testing.assert_close(end.x, torch.where(yes[:, None], y, x), rtol=1e-6, atol=1e-6)
    assert torch.equal(end.accepted, yes.double())


def test_the_mean_of_exp_of_minus_the_energy_error_is_one():
    x, p = start(200_000, 3), start(200_000, 3, 1)
    h = torch.full((len(x),), 0.8, dtype=torch.float64)
    here = GAUSSIAN.at(x)
    there, q = leapfrog(GAUSSIAN, here, p, h, 3)
    error = -GAUSSIAN.difference(here, there) + 0.5 * (q.square() - p.square()).sum(1)
    assert_close_mean((-error).exp(), 1.0)

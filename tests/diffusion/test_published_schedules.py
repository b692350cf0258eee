"""Printed figures of ladders and step sizes: Techniques 2 and 4, released settings, indices."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from ncsn_fast.diffusion import schedule
from ncsn_fast.diffusion.sde import VE, VP
from ncsn_fast.samplers.few_step import dpm_solver_pp, euler, heun
from ncsn_fast.samplers.langevin import consistent_annealed, refine_ladder
from ncsn_fast.training.configs import CONFIGS

# config: ratio of neighbours, its overlap C, T, Technique 4's epsilon and variance ratio
TECHNIQUES = {
    "ncsn-cifar10": (1.668101, 0.0, None, None, None),
    "cifar10": (1.037559, 0.5670, 5, 6.184e-6, 1.05548),
    "celeba": (1.018414, 0.5669, 5, 3.337e-6, 1.03135),
    "church": (1.012205, 0.5662, 4, 2.312e-6, 1.02236),
    "bedroom": (1.009122, 0.5665, 3, 1.7675e-6, 1.01737),
    "ffhq": (1.004537, 0.5669, 3, 8.93e-7, 1.00885),
}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_techniques_of_the_released_configurations(name):
    config = CONFIGS[name]
    ratio, overlap, t, epsilon, least = TECHNIQUES[name]
    found = (config.sigma_begin / config.sigma_end) ** (1 / (config.n_sigmas - 1))
    dimensions = config.channels * config.image_size**2
    assert found == pytest.approx(ratio, abs=6e-7)
    assert schedule.overlap(found, dimensions) == pytest.approx(overlap, abs=5e-5)
    if epsilon is None:
        return
    assert config.n_steps_each == t
    best = schedule.technique4(found, t, config.sigma_end)
    assert best == pytest.approx(epsilon, rel=5e-4)
    assert schedule.variance_ratio(best, found, t, config.sigma_end) == pytest.approx(
        least, abs=6e-6
    )
    if name == "church":  # whose released step does not follow the technique
        assert schedule.variance_ratio(config.epsilon, found, t, 0.01) == pytest.approx(
            1.0247, abs=5e-5
        )
        assert config.epsilon > 2 * best
    else:
        assert config.epsilon == pytest.approx(best, rel=0.02)


# sigma_1, L, T, epsilon, training iterations
RELEASED = {
    "cifar10": (50, 232, 5, 6.2e-6, 300_000),
    "celeba": (90, 500, 5, 3.3e-6, 210_000),
    "church": (140, 788, 4, 4.9e-6, 200_000),
    "bedroom": (190, 1086, 3, 1.8e-6, 150_000),
    "tower": (190, 1086, 3, 1.8e-6, 150_000),
    "ffhq": (348, 2311, 3, 9e-7, 80_000),
    "ncsn-cifar10": (1, 10, 100, 2e-5, 200_000),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_settings(name):
    config = CONFIGS[name]
    found = (config.sigma_begin, config.n_sigmas, config.n_steps_each, config.epsilon, config.steps)
    assert found == RELEASED[name]
    assert config.sigma_end == 0.01
    assert config.ema == (0.0 if name.startswith("ncsn-") else 0.999)


def test_the_error_function_is_a_misprint_of_the_normal_distribution():
    """With erf for Phi, as the paper of 2019 prints it, C is 1.19; it is at most 1."""
    ratio, dimensions = 5000 ** (1 / 231), 3072
    shift, three = math.sqrt(2 * dimensions) * (ratio - 1), 3 * ratio
    assert math.erf(shift + three) - math.erf(shift - three) == pytest.approx(1.19, abs=0.005)
    assert schedule.overlap(ratio, dimensions) == pytest.approx(0.567, abs=0.0005)


@pytest.mark.parametrize(("ratio", "dimensions"), [(1.04, 3072), (1.3, 5), (2.0, 1), (1.0, 3)])
def test_overlap_is_the_mass_within_three_deviations(ratio, dimensions):
    """Both ends of the interval count in few dimensions, where the ladder's are some 6 away."""
    phi, shift = NormalDist().cdf, math.sqrt(2 * dimensions) * (ratio - 1)
    expected = phi(shift + 3 * ratio) - phi(shift - 3 * ratio)
    assert schedule.overlap(ratio, dimensions) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("sigma_begin", "n", "n_sigma", "epsilon", "gamma", "beta"), [
    (50, 232, 1, 5.6e-6, 0.9638005, 0.2016589), (50, 232, 5, 1.1e-6, 0.9926529, 0.0857111),
    (140, 788, 1, 2.8e-6, None, 0.1789246),
])  # fmt: skip
def test_consistent_sampling_of_the_released_settings(
    sigma_begin, n, n_sigma, epsilon, gamma, beta
):
    ladder = refine_ladder(np.geomspace(sigma_begin, 0.01, n), n_sigma)
    program = consistent_annealed(ladder, epsilon / 0.01**2)
    assert program.nfe == (n - 1) * n_sigma + 1
    np.testing.assert_allclose(program.c[:-1] / ladder[1:], beta, atol=5e-8)
    if gamma is not None:
        np.testing.assert_allclose(ladder[1:] / ladder[:-1], gamma, atol=5.1e-8)


@pytest.mark.parametrize("e", [1.0, 1.3, 2.0, 5.0])
def test_consistent_sampling_by_its_exponent(e):
    """eta = 1 - gamma^e has beta = sqrt(1 - gamma^(2 (e - 1))); e = 1 is without noise."""
    ladder = np.geomspace(4.0, 0.1, 9)
    gamma = ladder[1] / ladder[0]
    # 1 - gamma is the end of the window, and may be outside it by a rounding.
    program = consistent_annealed(ladder, max(1 - gamma**e, 1 - ladder[1:].min() / ladder[-2]))
    beta = math.sqrt(1 - gamma ** (2 * (e - 1)))
    np.testing.assert_allclose(program.c[:-1] / ladder[1:], beta, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize(("sigma_min", "printed"), [(0.01, -2e-4), (0.002, -8e-6)])
@pytest.mark.parametrize("build", [euler, heun, dpm_solver_pp])
def test_the_last_jump_has_an_error_of_its_own(build, sigma_min, printed):
    """From sigma_min to 0, on data of deviation .5: -sigma_min^2 / (2 s^2), for every method."""
    program = build([sigma_min])
    factor = 1 - program.b[0] * sigma_min / (0.25 + sigma_min**2)
    exact = 0.5 / math.sqrt(0.25 + sigma_min**2)
    assert factor / exact - 1 == pytest.approx(printed, rel=1e-3)


def test_level_indices_are_integers():
    """floor(t (N - 1)) on linspace(1, t_end, N), as published, finds each level for t_end = 1e-5.

    For t_end = 1e-3 and N = 2000 it is off by one for half of them and never reaches the last;
    `discretise` takes every level once, whatever t_end is.
    """

    def misses(chain):
        n = len(chain.t)
        index = np.floor(chain.t * (n - 1)).astype(int)
        return int((index != np.arange(n)).sum()), index[0]

    for n in (100, 500, 1000, 2000):
        assert misses(VP().discretise(n, 1e-5)) == (0, 0)
        assert misses(VE().discretise(n, 1e-5)) == (0, 0)
    chain = VP().discretise(2000, 1e-3)
    assert misses(chain) == (1000, 1)
    np.testing.assert_allclose(chain.g**2, np.linspace(0.1 / 2000, 20 / 2000, 2000), rtol=1e-14)
    assert misses(VP().discretise(1000, 1e-3)) == (0, 0)


def test_evaluations_of_18_levels():
    ladder = np.geomspace(50, 0.01, 18)
    assert [build(ladder).nfe for build in (euler, heun, dpm_solver_pp)] == [18, 35, 18]

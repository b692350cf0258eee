"""What samplers draw when the score is exact and no network is involved."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import chi2

from ncsn_fast.diffusion import schedule
from ncsn_fast.samplers.langevin import annealed_langevin, consistent_annealed, refine_ladder
from ncsn_fast.samplers.program import Chains, initial_state, run

CIFAR10 = {
    "sigmas": schedule.geometric(50.0, 0.01, 232).double().numpy(),
    "epsilon": 6.2e-6,
    "t": 5,
}
NCSN = {"sigmas": schedule.geometric(1.0, 0.01, 10).double().numpy(), "epsilon": 2e-5, "t": 100}
SPREADS = [0.0, 0.25, 0.5]  # standard deviation of the data
TAIL = 1e-5  # chance of a band to be left, per test; the seeds are fixed


def ald(ladder, **options):
    return annealed_langevin(ladder["sigmas"], ladder["epsilon"], ladder["t"], **options)


def moments(program, mean, variance, *, data_mean, data_variance):
    """Mean and variance of one pixel after every row, for data N(data_mean, data_variance I).

    The score -(x - m) / (v + sigma^2) is linear, so each row is an affine map plus noise.
    """
    means, variances = [mean], [variance]
    for k in range(program.nfe):
        a, b, g, c, p, q, _, _ = program.coefficients(k)
        assert (a, g, p, q) == (1, 0, 0, 0)
        slope = -program.sigma[k] / (data_variance + program.sigma[k] ** 2)  # f = slope (x - m)
        factor = 1 + b * slope
        means.append(factor * means[-1] + (1 - factor) * data_mean)
        variances.append(factor**2 * variances[-1] + c**2)
    return np.array(means), np.array(variances)


def draw(program, n, seed, *, data_mean, data_variance, initial=None):
    """n pixels drawn by the program with the project's noise: 64 chains, the rest in a chain."""
    samples, shape = torch.arange(64), (1, 1, n // 64)
    x = initial_state(program, seed, samples, shape) if initial is None else initial

    def network(x, k):
        sigma = program.sigma[k]
        return -sigma * (x - data_mean) / (data_variance + sigma**2)

    chains = Chains(x=x.contiguous(), seed=seed, samples=samples)
    return run(program, network, chains).double().flatten().numpy()


def assert_variance(x, expected):
    """Of nearly Gaussian draws: (n - 1) s^2 / variance is chi-square with n - 1 degrees."""
    low, high = chi2.ppf([TAIL / 2, 1 - TAIL / 2], len(x) - 1) / (len(x) - 1)
    assert low <= x.var(ddof=1) / expected <= high


def assert_mean(x, expected, variance):
    assert abs(x.mean() - expected) <= 4.5 * math.sqrt(variance / len(x))


@pytest.mark.parametrize(
    ("ladder", "printed"),
    [
        (CIFAR10, (1.12830e-4, 0.07128, 0.284783)),
        (NCSN, (1.11111e-4, 0.0645315, 0.2579088)),
    ],
    ids=["ncsnv2", "ncsn"],
)
@pytest.mark.parametrize("spread", SPREADS)
def test_langevin_variance_is_the_recursion_and_the_printed_figure(ladder, printed, spread):
    """From U[0, 1]: v' = (1 - alpha_i / (s^2 + sigma_i^2))^2 v + 2 alpha_i."""
    program = ald(ladder, denoise=False)
    mean, v = moments(program, 0.5, 1 / 12, data_mean=0.3, data_variance=spread**2)
    expected, centre = 1 / 12, 0.2
    for sigma in ladder["sigmas"]:
        alpha = ladder["epsilon"] * sigma**2 / 0.01**2
        for _ in range(ladder["t"]):
            shrink = 1 - alpha / (spread**2 + sigma**2)
            expected, centre = shrink**2 * expected + 2 * alpha, shrink * centre
    assert v[-1] == pytest.approx(expected, rel=1e-6)
    assert mean[-1] - 0.3 == pytest.approx(centre, abs=1e-9)
    figure = printed[SPREADS.index(spread)]
    digits = 5e-6 if figure == 0.07128 else 5e-7
    assert v[-1] == pytest.approx(figure, abs=digits if figure > 1e-3 else 5e-10)


def test_denoised_variance():
    program = ald(CIFAR10)
    _, v = moments(program, 0.5, 1 / 12, data_mean=0.3, data_variance=0.0625)
    assert v[-1] == pytest.approx(0.071052, abs=5e-7)
    _, v = moments(program, 0.5, 1 / 12, data_mean=0.3, data_variance=0.0)
    assert v[-1] == pytest.approx(0, abs=1e-18)  # of a point, the denoised sample is the point


def test_the_forms_are_the_same_family_with_half_the_step():
    paper = annealed_langevin(NCSN["sigmas"], 2 * NCSN["epsilon"], 100, form="paper")
    code = ald(NCSN)
    np.testing.assert_allclose(paper.b, code.b)
    np.testing.assert_allclose(paper.c, code.c)
    _, halved = moments(ald(NCSN, form="paper", denoise=False), 0.5, 1 / 12, data_mean=0.3,
                        data_variance=0.0)  # fmt: skip
    assert halved[-1] == pytest.approx(1e-4 / (1 - 0.05), rel=1e-4)  # sigma^2 / (1 - eta / 2)


@pytest.mark.parametrize(("ladder", "spread", "n"), [
    (CIFAR10, 0.25, 16_384), (NCSN, 0.0, 16_384), (NCSN, 0.5, 16_384),
], ids=["ncsnv2-.25", "ncsn-0", "ncsn-.5"])  # fmt: skip
@pytest.mark.parametrize("denoise", [False, True])
def test_sampled_langevin_moments(ladder, spread, n, denoise):
    if spread == 0 and denoise:
        spread = 0.02  # the point itself has no variance to compare
    program = ald(ladder, denoise=denoise)
    data = {"data_mean": 0.3, "data_variance": spread**2}
    mean, v = moments(program, 0.5, 1 / 12, **data)
    x = draw(program, n, seed=11, **data)
    assert_mean(x, mean[-1], v[-1])
    assert_variance(x, v[-1])


CAS_LADDER = np.geomspace(2.0, 0.05, 20)
GAMMA = CAS_LADDER[1] / CAS_LADDER[0]
ETAS = {
    "least": 1 - GAMMA,
    "default": None,
    "middle": 0.5,
    "one": 1.0,
    "most": 1 + GAMMA,
}
etas = pytest.mark.parametrize("eta", ETAS.values(), ids=ETAS)


@etas
def test_consistent_sampling_of_a_point_has_variance_sigma_squared_at_every_level(eta):
    program = consistent_annealed(CAS_LADDER, eta, denoise=False)
    _, v = moments(program, 0.3, CAS_LADDER[0] ** 2, data_mean=0.3, data_variance=0.0)
    np.testing.assert_allclose(v[:-2], CAS_LADDER[:-1] ** 2, rtol=1e-9)
    np.testing.assert_allclose(v[-2], CAS_LADDER[-1] ** 2, rtol=1e-9)
    _, denoised = moments(consistent_annealed(CAS_LADDER, eta), 0.3, CAS_LADDER[0] ** 2,
                          data_mean=0.3, data_variance=0.0)  # fmt: skip
    assert denoised[-1] == pytest.approx(0, abs=1e-20)


def test_consistent_sampling_stays_consistent_on_a_refined_ladder():
    fine = refine_ladder(CAS_LADDER, 5)
    program = consistent_annealed(fine)
    _, v = moments(program, 0.3, fine[0] ** 2, data_mean=0.3, data_variance=0.0)
    np.testing.assert_allclose(v[:-1], fine**2, rtol=1e-9)


def test_langevin_of_a_point_is_not_consistent():
    """What consistent sampling mends: plain Langevin dynamics ends above sigma_L^2."""
    program = annealed_langevin(CAS_LADDER, 0.05**2 * 0.1, 1, denoise=False)
    _, v = moments(program, 0.3, CAS_LADDER[0] ** 2, data_mean=0.3, data_variance=0.0)
    assert v[-1] > 1.5 * CAS_LADDER[-1] ** 2


@etas
def test_sampled_consistent_variance_of_a_point_at_every_level(eta):
    """Chains of 20 levels, each level's state judged by its own chi-square band."""
    program = consistent_annealed(CAS_LADDER, eta, denoise=False)
    states = []

    def network(x, k):
        states.append(x.double().flatten().numpy().copy())
        return -(x - 0.3) / float(program.sigma[k])

    samples = torch.arange(32)
    generator = torch.Generator().manual_seed(2)
    x = 0.3 + 2.0 * torch.randn(32, 1, 8, 16, generator=generator)
    run(program, network, Chains(x=x, seed=3, samples=samples))
    assert len(states) == 20
    for sigma, state in zip(CAS_LADDER, states, strict=True):
        assert_variance(state, sigma**2)
        assert_mean(state, 0.3, sigma**2)


# The toy of NCSN (2019): Gaussians at (5, 5) and (-5, -5) with weights .8 and .2. Level sigma sees
# components of standard deviation sigma, and sigma = 1 is the data; the step is .1 in the form
# x + (a / 2) s + sqrt(a) z.
WEIGHT, CENTRE = 0.8, 5 * math.sqrt(2)  # along the axis through both modes
TOY = {"epsilon": 0.1, "denoise": False, "form": "paper"}
TOY_CHAINS = 16_384


def toy_shift(u, sigma):
    """sigma^2 * score along the axis, at u."""
    logit = math.log(WEIGHT / (1 - WEIGHT)) + 2 * CENTRE * u / sigma**2
    return CENTRE * (2 * expit(logit) - 1) - u


def toy_expected(program):
    """Share of chains with u > 0 at the end, by propagating their density on grids.

    The grids are a third of a step's noise apart, so that sums are integrals to many digits.
    """
    u = np.linspace(-8, 8, 2001) * math.sqrt(2)
    density = np.maximum(0, 1 - np.abs(u) / (8 * math.sqrt(2))) / (8 * math.sqrt(2))
    grid = u
    for k in range(program.nfe):
        sigma, c = program.sigma[k], program.c[k]
        if k == 0 or sigma != program.sigma[k - 1]:
            half = math.ceil((CENTRE + 7 * sigma) / (c / 3))
            grid = np.arange(-half, half + 1) * (c / 3)
        if k < 2 or sigma != program.sigma[k - 2]:  # the first step of a level changes the grid
            moved = u + program.b[k] / sigma * toy_shift(u, sigma)
            z = (grid[:, None] - moved) / c
            kernel = np.exp(-0.5 * z**2) / (c * math.sqrt(2 * math.pi)) * (u[1] - u[0])
        density, u = kernel @ density, grid
    mass = density * (u[1] - u[0])
    assert mass.sum() == pytest.approx(1, abs=1e-5)
    return mass[u > 0].sum() + 0.5 * mass[u == 0].sum()


def toy_share(program, seed=0):
    """The same share, drawn in two dimensions from a start that is uniform on [-8, 8]^2."""

    def network(x, k):
        sigma = float(program.sigma[k])
        u = (x.sum(3) / math.sqrt(2)).double().numpy()
        shift = torch.from_numpy(toy_shift(u, sigma)).float()[..., None] / math.sqrt(2)
        across = (x - x.flip(3)) / 2  # the part of x across the axis goes to 0
        return (shift - across) / sigma

    shape = (64, 1, TOY_CHAINS // 64, 2)
    x = 16 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 8
    end = run(program, network, Chains(x=x, seed=21 + seed, samples=torch.arange(64)))
    return (end.sum(3) > 0).double().mean().item()


def test_annealing_recovers_the_weights_of_a_mixture():
    program = annealed_langevin(np.geomspace(20, 1, 10), n_steps_each=100, **TOY)
    expected = toy_expected(program)  # .782: modes part before 100 steps a level settle them
    assert expected == pytest.approx(WEIGHT, abs=0.02)
    band = 4.5 * math.sqrt(expected * (1 - expected) / TOY_CHAINS)
    assert abs(toy_share(program) - expected) < band < 0.02


def test_plain_langevin_keeps_the_weights_of_its_start():
    program = annealed_langevin([1.0], n_steps_each=1000, **TOY)
    expected = toy_expected(program)
    assert expected == pytest.approx(0.5, abs=0.02)
    band = 4.5 * math.sqrt(expected * (1 - expected) / TOY_CHAINS)
    assert abs(toy_share(program) - expected) < band < 0.02

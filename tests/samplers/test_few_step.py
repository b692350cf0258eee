"""Euler, Heun, DPM-Solver++, `fast` on Gaussian data and on a mixture: exact solutions."""

import functools
import math

import numpy as np
import pytest
import torch
from gaussian import Data, follow, moments

from ncsn_fast.diffusion import spacing
from ncsn_fast.ops import noise
from ncsn_fast.ops.noise import Stream
from ncsn_fast.samplers.choices import FAST_ETA, FAST_FINAL, FAST_HISTORY, FAST_STEPS
from ncsn_fast.samplers.few_step import (
    Churn,
    dpm_solver_pp,
    euler,
    fast,
    heun,
    rows_of_knots,
)
from ncsn_fast.samplers.langevin import consistent_annealed
from ncsn_fast.samplers.program import Chains, initial_state, run

METHODS = {"euler": euler, "heun": heun, "dpmpp": dpm_solver_pp}  # those that solve the flow
methods = pytest.mark.parametrize("build", METHODS.values(), ids=METHODS)
DATA = Data(variance=0.25)


def geometric(*arguments):
    return spacing.polynomial(*arguments, 1.0)


def error(program, sigma_begin):
    """x / exact - 1 from sigma_begin z: data of deviation .5 end at .5 z / sqrt(.25 + sigma^2)."""
    exact = 0.5 / math.sqrt(0.25 + sigma_begin**2)
    return follow(program, DATA, 1.0) / exact - 1


# levels, ends; errors of heun, dpmpp, dpmpp geometric, heun geometric, euler, euler geometric
PRINTED = [
    (10, 50, 0.01, 0.1501, 0.1021, 3.253e-2, 0.1450, -0.2340, -0.2107),
    (18, 50, 0.01, 3.839e-2, 4.078e-2, 1.389e-2, 3.560e-2, -0.1316, -0.1178),
    (40, 50, 0.01, 6.703e-3, 7.005e-3, 2.724e-3, 6.103e-3, -5.978e-2, -5.330e-2),
    (80, 50, 0.01, 1.443e-3, 1.474e-3, 5.216e-4, 1.293e-3, -3.007e-2, -2.677e-2),
    (18, 80, 0.002, 5.527e-2, 6.230e-2, 2.064e-2, 5.736e-2, -0.1539, -0.1443),
    (40, 80, 0.002, 9.773e-3, 1.040e-2, 4.493e-3, 9.890e-3, -7.028e-2, -6.568e-2),
    (80, 80, 0.002, 2.310e-3, 2.380e-3, 1.110e-3, 2.319e-3, -3.534e-2, -3.298e-2),
    (160, 80, 0.002, 5.565e-4, 5.646e-4, 2.692e-4, 5.566e-4, -1.772e-2, -1.653e-2),
]


@pytest.mark.parametrize("row", PRINTED, ids=lambda row: f"{row[0]}-{row[1]}")
def test_printed_errors(row):
    n, begin, end, *printed = row
    karras = spacing.karras
    columns = [(heun, karras), (dpm_solver_pp, karras), (dpm_solver_pp, geometric),
               (heun, geometric), (euler, karras), (euler, geometric)]  # fmt: skip
    for (build, space), expected in zip(columns, printed, strict=True):
        program = build(space(begin, end, n))
        assert program.nfe == (2 * n - 1 if build is heun else n)
        found = error(program, begin)
        digit = 10.0 ** (math.floor(math.log10(abs(expected))) - 3)
        assert found == pytest.approx(expected, abs=0.51 * digit), (build, space)


@pytest.mark.parametrize(
    ("build", "order"), [(euler, 2.0), (heun, 4.15), (dpm_solver_pp, 4.2)], ids=METHODS
)
def test_orders(build, order):
    """Twice the steps: half the error for a method of order 1, a quarter for one of order 2."""
    coarse, fine = (error(build(spacing.karras(80, 0.002, n)), 80) for n in (80, 160))
    assert coarse / fine == pytest.approx(order, rel=0.02)


def plain_heun(ladder, d, x):
    """Algorithm 1 of the paper; d(x, sigma) is its slope (x - D) / sigma."""
    for now, after in zip(ladder, [*ladder[1:], 0.0], strict=True):
        slope = d(x, now)
        end = x + (after - now) * slope
        if after > 0:
            end = x + (after - now) * (slope + d(end, after)) / 2
        x = end
    return x


def plain_dpmpp(ladder, d, x):
    """DPM-Solver++(2M) with r = h_{i-1} / h_i, as printed."""
    old, h_old = None, None
    for now, after in zip(ladder, [*ladder[1:], 0.0], strict=True):
        denoised = x - now * d(x, now)
        if after == 0:
            return denoised
        h, mix = math.log(now / after), denoised
        if old is not None:
            r = h_old / h
            mix = (1 + 1 / (2 * r)) * denoised - old / (2 * r)
        x = after / now * x - math.expm1(-h) * mix
        old, h_old = denoised, h
    return x


def mixture_slope(x, sigma):
    """-sigma * score of a mixture: .3 N(-1, .04) + .7 N(.5, .09), noised."""
    centres, spreads = torch.tensor([-1.0, 0.5]), torch.tensor([0.04, 0.09])
    v = spreads.double() + float(sigma) ** 2
    gap = x.double()[..., None] - centres.double()
    weights = torch.softmax(
        torch.tensor([0.3, 0.7]).double().log() - gap**2 / (2 * v) - v.log() / 2, -1
    )
    return float(sigma) * (weights * gap / v).sum(-1)


def plain_euler(ladder, d, x):
    for now, after in zip(ladder, [*ladder[1:], 0.0], strict=True):
        x = x + (after - now) * d(x, now)
    return x


PLAIN = {"euler": plain_euler, "heun": plain_heun, "dpmpp": plain_dpmpp}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("n", [1, 2, 3, 12])
def test_tables_are_the_algorithms_on_a_mixture(name, n):
    """Run in float64 by the loop that the engines follow, on a ladder that is not geometric."""
    ladder = spacing.karras(20.0, 0.02, n, 3.0)
    program = METHODS[name](ladder)
    x = 20 * torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    chains = Chains(x=x.clone(), seed=0, samples=torch.arange(4))
    run(program, lambda x, k: -mixture_slope(x, program.sigma[k]), chains)
    torch.testing.assert_close(
        chains.x, PLAIN[name](ladder, mixture_slope, x), rtol=1e-10, atol=1e-10
    )


@methods
def test_the_flow_draws_a_mixture(build):
    """Shares of the modes, from the prior and the project's noise in float32."""
    program = build(spacing.karras(20.0, 0.01, 60))
    samples = torch.arange(64)
    x = initial_state(program, 3, samples, (1, 16, 16))
    chains = Chains(x=x, seed=3, samples=samples)
    run(program, lambda x, k: -mixture_slope(x, program.sigma[k]).float(), chains)
    x, n = chains.x.double().flatten(), chains.x.numel()
    share = (x > -0.4).double().mean().item()
    assert abs(share - 0.7) < 4.5 * math.sqrt(0.21 / n) + 0.02  # the flow's own error is below .02
    upper = x[x > -0.4]
    assert upper.mean().item() == pytest.approx(0.5, abs=0.03)
    assert upper.std().item() == pytest.approx(0.3, abs=0.03)


@methods
def test_one_level(build):
    program = build([0.3])
    assert (program.nfe, program.initial, program.has_history) == (1, "prior", False)
    assert program.coefficients(0)[:4] == (1.0, 0.3, 0.0, 0.0)
    assert follow(program, Data(mean=0.7, variance=0.0), 0.1) == pytest.approx(0.7, rel=1e-12)


@methods
def test_without_the_denoise_a_chain_ends_at_the_last_level(build):
    ladder = spacing.karras(50, 0.01, 40)
    program, whole = build(ladder, denoise=False), build(ladder)
    assert program.nfe == whole.nfe - 1
    for column in ("sigma", "a", "b", "c", "g", "p", "q", "level"):
        np.testing.assert_array_equal(getattr(program, column), getattr(whole, column)[:-1])
    _, variance = moments(program, DATA)
    assert variance == pytest.approx(0.25 + 1e-4, rel=0.15 if build is euler else 0.02)
    with pytest.raises(ValueError, match="leave no step; give more steps"):
        build([0.3], denoise=False)


def test_levels_of_heun_are_its_steps():
    program = heun([4.0, 2.0, 1.0])
    assert program.level.tolist() == [0, 0, 1, 1, 2]
    assert program.sigma.tolist() == [4, 2, 2, 1, 1]
    assert heun([4.0, 2.0, 1.0], denoise=False).level.tolist() == [0, 0, 1, 1]


def plain_churn(ladder, churn, x, draw, second):
    """Algorithm 2 of the paper on Gaussian data; draw(i) is the noise of step i > 0."""

    def d(x, sigma):
        return sigma * x / (0.25 + sigma**2)

    gamma = min(churn.amount / len(ladder), math.sqrt(2) - 1)
    for i, (now, after) in enumerate(zip(ladder, [*ladder[1:], 0.0], strict=True)):
        hat = now * (1 + gamma) if churn.s_min <= now <= churn.s_max else now
        if i > 0:
            x = x + math.sqrt(hat**2 - now**2) * churn.s_noise * draw(i)
        slope = d(x, hat)
        end = x + (after - hat) * slope
        if second and after > 0:
            end = x + (after - hat) * (slope + d(end, after)) / 2
        x = end
    return x


CHURNS = [
    Churn(5.0), Churn(80.0, 0.05, 1.0, 1.007), Churn(1e9, s_noise=0.0), Churn(2.0, 0.0, 2.0, 1.3),
]  # fmt: skip


@pytest.mark.parametrize("churn", CHURNS, ids=repr)
@pytest.mark.parametrize("build", [euler, heun])
def test_churn_is_the_papers(build, churn):
    ladder = spacing.karras(6.0, 0.02, 9)
    program = build(ladder, churn=churn)
    assert program.nfe == build(ladder).nfe
    samples, shape = torch.arange(3), (1, 2, 5)
    x = 6 * torch.randn(3, *shape, generator=torch.Generator().manual_seed(5)).double()
    rows = [r.stop - 1 for r in program.level_rows()]  # the last row of a step has its noise

    def draw(i):
        return noise.normal(11, samples, Stream.SAMPLER, rows[i - 1], shape).double()

    expected = plain_churn(ladder, churn, x, draw, build is heun)
    chains = Chains(x=x.clone(), seed=11, samples=samples)
    slope = -program.sigma / (0.25 + program.sigma**2)
    run(program, lambda x, k: slope[k] * x, chains)
    torch.testing.assert_close(chains.x, expected, rtol=1e-6, atol=1e-6)


def test_churn_starts_at_the_raised_sigma():
    program = heun([4.0, 1.0], churn=Churn(1e9))
    assert program.sigma[0] == pytest.approx(4 * math.sqrt(2))
    assert program.sigma.tolist()[1:] == [1.0, pytest.approx(math.sqrt(2))]
    assert program.c.tolist() == [0.0, pytest.approx(1.0), 0.0]
    outside = heun([4.0, 1.0], churn=Churn(1e9, s_min=1.5, s_max=3.0))
    assert (outside.sigma.tolist(), outside.c.tolist()) == ([4.0, 1.0, 1.0], [0.0] * 3)


def plain_dpmpp_sde(ladder, eta, s_noise):
    """Variance from the prior by the printed update, on (x, D of the row before)."""
    covariance, h_old = np.diag([ladder[0] ** 2, 0.0]), None
    for now, after in zip(ladder, [*ladder[1:], 0.0], strict=True):
        share = 0.25 / (0.25 + now**2)  # D = share x
        if after == 0:
            return share**2 * covariance[0, 0]
        h = math.log(now / after)
        k = 0.0 if h_old is None else h / (2 * h_old)
        keep, pull = after / now * math.exp(-eta * h), 1 - math.exp(-h - eta * h)
        step = np.array([[keep + pull * share * (1 + k), -pull * k], [share, 0.0]])
        kick = s_noise * after * math.sqrt(1 - math.exp(-2 * eta * h))
        covariance, h_old = step @ covariance @ step.T + np.diag([kick**2, 0.0]), h
    raise AssertionError


@pytest.mark.parametrize(("eta", "s_noise"), [(0.0, 1.0), (0.4, 1.0), (1.0, 1.0), (1.0, 1.01)])
def test_the_sde_variant_of_dpmpp(eta, s_noise):
    ladder = spacing.karras(50, 0.01, 18)
    program = dpm_solver_pp(ladder, eta=eta, s_noise=s_noise)
    expected = plain_dpmpp_sde(ladder, eta, s_noise)
    assert moments(program, DATA)[1] == pytest.approx(expected, rel=1e-10)
    assert (program.c[:-1] > 0).all() == (eta > 0)
    assert program.c[-1] == 0
    fine = dpm_solver_pp(geometric(50, 0.01, 400), eta=eta)
    assert moments(fine, DATA)[1] == pytest.approx(0.25, rel=2e-3)


def test_the_step_to_zero_may_extrapolate():
    """(1 + w) D_L - w D_{L-1}: its last two evaluations, weighted by hand."""
    ladder, w = geometric(9.0, 0.2, 5), 0.3
    flow = dpm_solver_pp(ladder)
    x, before = (follow(flow.head(n), DATA, 1.0) for n in (4, 3))
    denoised = [
        DATA.variance / (DATA.variance + sigma**2) * value
        for sigma, value in ((ladder[-1], x), (ladder[-2], before))
    ]
    found = follow(dpm_solver_pp(ladder, final=w), DATA, 1.0)
    assert found == pytest.approx((1 + w) * denoised[0] - w * denoised[1], rel=1e-6)
    assert follow(flow, DATA, 1.0) == pytest.approx(denoised[0], rel=1e-6)


ETA = 4.0


def fast_ladder(n=FAST_STEPS, begin=9.0, end=0.01):
    return geometric(begin, end, n)


@pytest.mark.parametrize("n", [1, 2, FAST_STEPS])
def test_fast_is_dpmpp_with_more_noise(n):
    program = fast(fast_ladder(n), eta=ETA)
    assert (program.name, program.nfe, program.initial) == ("fast", n, "prior")
    same = dpm_solver_pp(fast_ladder(n), eta=ETA)
    for column in ("sigma", "level", "a", "b", "c", "g", "p", "q"):
        np.testing.assert_array_equal(getattr(program, column), getattr(same, column))
    expected = plain_dpmpp_sde(fast_ladder(n), ETA, 1.0)
    assert moments(program, DATA)[1] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "denoise"), [(1, True), (2, True), (2, False), (FAST_STEPS, True)])
def test_fast_takes_eta_and_history_from_knots(n, denoise):
    program = fast(fast_ladder(n), denoise=denoise)
    assert (program.name, program.nfe) == ("fast", n - (not denoise))
    eta, history = rows_of_knots(FAST_ETA, FAST_HISTORY, n)
    same = dpm_solver_pp(
        fast_ladder(n), eta=[*eta, 0.0], history=[*history, 0.0], final=FAST_FINAL, denoise=denoise
    )
    for column in ("sigma", "level", "a", "b", "c", "g", "p", "q"):
        np.testing.assert_array_equal(getattr(program, column), getattr(same, column))


def test_values_between_knots():
    eta, history = rows_of_knots((1.0, 9.0), (0.0, 1.0, 0.0), 6)
    assert eta == pytest.approx([1.0, 2.25, 4.0, 6.25, 9.0])
    assert history == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])
    assert [len(column) for column in rows_of_knots(FAST_ETA, FAST_HISTORY, 1)] == [0, 0]


@pytest.mark.parametrize("n", [10, FAST_STEPS, 30])
def test_the_variance_of_fast(n):
    """It is about right where the data's deviation is well above the last level, 0.01."""
    for deviation in (0.05, 0.1, 0.2):
        data = Data(mean=-2.3, variance=deviation**2)
        mean, variance = moments(fast(fast_ladder(n)), data)
        assert mean == pytest.approx(-2.3, abs=1e-4)
        assert variance == pytest.approx(deviation**2, rel=0.25)


@pytest.mark.parametrize("eta", [0.0, 1.0, ETA])
def test_noise_forgets_the_start_eta_times_as_often_again(eta):
    """A start that is off by 1 stays off by ((v + sigma_L^2) / (v + sigma_1^2))^((1 + eta) / 2)."""
    ladder = geometric(9, 0.01, 3000)
    kept = follow(fast(ladder, eta=eta, denoise=False), DATA, 1.0)
    exact = ((0.25 + 1e-4) / (0.25 + 81)) ** ((1 + eta) / 2)
    assert kept == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("eta", [1.0, ETA])
def test_data_off_the_priors_mean(eta):
    """What is left of the prior's mean, 0, after 30 steps: next to nothing."""
    data = Data(mean=-2.3, variance=0.25)
    mean, variance = moments(fast(fast_ladder(30), eta=eta), data)
    flow, _ = moments(fast(fast_ladder(30), eta=0.0), data)
    assert abs(flow + 2.3) > 0.1
    assert mean == pytest.approx(-2.3, abs=1e-2 if eta == 1 else 1e-4)
    assert variance == pytest.approx(0.25, rel=0.05)


def test_the_released_consistent_step_of_church():
    program = consistent_annealed(np.geomspace(140, 0.01, 788), 2.8e-6 / 0.01**2)
    np.testing.assert_allclose(program.c[:-1] / program.sigma[1:], 0.1789246, atol=5e-8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        *[
            (functools.partial(f, [1.0, 2.0]), "sigmas must be descending")
            for f in METHODS.values()
        ],
        *[(functools.partial(f, [1.0, 0.0]), "positive and finite") for f in METHODS.values()],
        *[(functools.partial(f, []), "non-empty vector") for f in METHODS.values()],
        (lambda: Churn(-1.0), "churn and s_noise must be at least 0; got -1.0 and 1.0"),
        (lambda: Churn(math.nan), "churn and s_noise must be at least 0; got nan"),
        (lambda: Churn(1.0, s_noise=-2.0), "got 1.0 and -2.0"),
        (lambda: Churn(1.0, 3.0, 2.0), "expected 0 <= s_min <= s_max; got 3.0 and 2.0"),
        (
            lambda: fast([2.0, 1.0], eta=-3.0),
            "must be at least 0; got -3.0 and 1.0",
        ),
        (lambda: fast([2.0], denoise=False), "leave no step; give more steps"),
        (lambda: dpm_solver_pp([2.0, 1.0], eta=-1.0), "eta and s_noise must be at least 0; got -1"),
        (lambda: dpm_solver_pp([2.0, 1.0], s_noise=math.nan), "got 0.0 and nan"),
        (lambda: dpm_solver_pp([2.0, 1.0], final=math.nan), "final must be finite; got nan"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()

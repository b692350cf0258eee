"""ULA, MALA and HMC: exactness on a mixture, what adaptation does, and their bookkeeping."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from cross_section import cross_section
from gaussian_chains import GAUSSIAN, GAUSSIAN_SCORE, assert_close_mean, start
from scipy.stats import kstest, norm

from ncsn_fast.samplers import mcmc
from ncsn_fast.samplers.mcmc import hmc, leapfrog, mala, ula
from ncsn_fast.samplers.targets import Target, lobatto

# A mixture that chains can cross: weights .7 and .3, means +-1.5 along the first axis, spread .8.
WEIGHT, CENTRE, SPREAD = 0.7, 1.5, 0.8


def mixture_parts(x):
    first = x[:, 0].unsqueeze(1) - torch.tensor([CENTRE, -CENTRE], dtype=x.dtype)
    weights = torch.tensor([WEIGHT, 1 - WEIGHT], dtype=x.dtype).log()
    others = x[:, 1:].square().sum(1, keepdim=True)
    return weights - 0.5 * (first.square() + others) / SPREAD**2


def mixture_log_density(x):
    return mixture_parts(x).logsumexp(1)


def mixture_score(x):
    share = mixture_parts(x).softmax(1)
    mean = torch.zeros_like(x)
    mean[:, 0] = CENTRE * (share[:, 0] - share[:, 1])
    return (mean - x) / SPREAD**2


def mixture_draw(n, d, seed):
    x = start(n, d, seed, SPREAD)
    u = torch.rand(n, generator=torch.Generator().manual_seed(seed + 99))
    x[:, 0] += torch.where(u < WEIGHT, CENTRE, -CENTRE)
    return x


def test_detailed_balance_on_a_grid():
    """pi(x) q(y | x) A(x, y) is symmetric, with A from the sampler's own pieces."""
    target = Target(log_density=mixture_log_density)
    grid, h = torch.linspace(-4, 4, 41, dtype=torch.float64), 0.9
    x, y = (g.reshape(-1, 1) for g in torch.meshgrid(grid, grid, indexing="ij"))
    here = target.at(x)
    z = (y - x - h**2 / 2 * here.score) / h  # the momentum that proposes y
    there, q = leapfrog(target, here, z, torch.full((len(x),), h, dtype=torch.float64), 1)
    torch.testing.assert_close(there.x, y)
    log_a = target.difference(here, there) + 0.5 * (z.square() - q.square()).flatten()
    flow = (mixture_log_density(x) - 0.5 * z.square().flatten() + log_a.clamp(max=0)).exp()
    flow = flow.reshape(41, 41)
    torch.testing.assert_close(flow, flow.T, rtol=1e-9, atol=1e-15)


def test_leapfrog_is_reversible_and_keeps_its_invariant():
    target, x, p = Target(log_density=mixture_log_density), start(50, 4), start(50, 4, 1)
    h = torch.full((50,), 0.3, dtype=torch.float64)
    there, q = leapfrog(target, target.at(x), p, h, 20)
    back, r = leapfrog(target, target.at(there.x), -q, h, 20)
    assert float((back.x - x).abs().max()) < 1e-6
    assert float((r + p).abs().max()) < 1e-6
    # On N(0, 1): p^2 / 2 + x^2 / 2 (1 - h^2 / 4) stays, for any h < 2.
    h = h * 5
    there, q = leapfrog(GAUSSIAN, GAUSSIAN.at(x), p, h, 7)
    shadow = 1 - 1.5**2 / 4
    torch.testing.assert_close(
        q.square() + there.x.square() * shadow, p.square() + x.square() * shadow
    )


SAMPLERS = {
    "mala": lambda target, x, **o: mala(target, x, step_size=0.9, **o),
    "hmc": lambda target, x, **o: hmc(target, x, step_size=0.5, n_leapfrog=4, **o),
}


@pytest.mark.parametrize("known", ["density", "score"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exact_on_a_gaussian(sampler, known):
    """From exact draws the law stays; from far away it is reached. ULA at this step is off."""
    target = GAUSSIAN if known == "density" else GAUSSIAN_SCORE
    sampler = SAMPLERS[sampler]
    end = sampler(target, start(20_000, 2), n_steps=15, seed=7).x
    assert_close_mean(end.flatten(), 0.0)
    assert_close_mean(end.square().flatten(), 1.0)
    assert_close_mean(end.prod(1), 0.0)
    far = sampler(target, start(4000, 1) * 0.1 + 4, n_steps=80, seed=9).x.flatten()
    assert kstest(far.numpy(), norm.cdf).pvalue > 1e-3


@pytest.mark.parametrize(("sampler", "known"), cross_section([*SAMPLERS], ["density", "score"]))
def test_exact_on_a_mixture(sampler, known):
    """Exact draws stay exact, and chains that all start in one mode find both weights."""
    target = Target(log_density=mixture_log_density)
    if known == "score":
        target = Target(score=mixture_score, n_points=6)
    x = mixture_draw(20_000, 2, seed=4)
    variance = SPREAD**2 + CENTRE**2 - (CENTRE * (2 * WEIGHT - 1)) ** 2
    for chains, steps in ((x, 10), (start(20_000, 2, 5, SPREAD) - CENTRE, 150)):
        end = SAMPLERS[sampler](target, chains, n_steps=steps, seed=2).x
        assert_close_mean((end[:, 0] > 0).double(), mass_above_zero())
        assert_close_mean(end[:, 0], CENTRE * (2 * WEIGHT - 1))
        assert_close_mean((end[:, 0] - CENTRE * (2 * WEIGHT - 1)).square(), variance)
        assert_close_mean(end[:, 1].square(), SPREAD**2)


def mass_above_zero():
    above = norm.cdf(CENTRE / SPREAD)
    return WEIGHT * above + (1 - WEIGHT) * (1 - above)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_line_integrals(n):
    """Gauss-Lobatto: symmetric, exact to degree 2 n - 3, and not beyond."""
    nodes, weights = map(np.array, lobatto(n))
    assert (nodes[0], nodes[-1]) == (0, 1)
    np.testing.assert_array_equal(weights, weights[::-1])
    for degree in range(2 * n - 2):
        assert weights @ nodes**degree == pytest.approx(1 / (degree + 1), rel=1e-12)
    assert weights @ nodes ** (2 * n - 2) != pytest.approx(1 / (2 * n - 1), rel=1e-9)


def test_differences_of_log_density_from_the_score():
    a, b = mixture_draw(500, 3, 1), mixture_draw(500, 3, 2)
    exact = mixture_log_density(b) - mixture_log_density(a)
    errors = []
    for n in (2, 3, 5, 9, 17):
        target = Target(score=mixture_score, n_points=n)
        found = target.difference(target.at(a), target.at(b))
        torch.testing.assert_close(found, -target.difference(target.at(b), target.at(a)))
        errors.append(float((found - exact).abs().mean()))
    assert errors[-1] < 1e-4 < 1e-2 < errors[0]
    assert errors == sorted(errors, reverse=True)
    both = Target(score=mixture_score, log_density=mixture_log_density)
    torch.testing.assert_close(both.difference(both.at(a), both.at(b)), exact)
    by_autograd = Target(log_density=mixture_log_density).at(a).score
    torch.testing.assert_close(by_autograd, both.at(a).score)


@pytest.mark.parametrize(
    ("guess", "goal"),
    cross_section([0.01, 0.5, 20.0], [(1, mcmc.MALA_TARGET), (5, mcmc.HMC_TARGET), (5, 0.9)]),
)
def test_warm_up_reaches_its_target(guess, goal):
    n_leapfrog, target_acceptance = goal
    spreads = torch.linspace(0.5, 1.5, 20, dtype=torch.float64)  # harder than one scale

    def log_density(x):
        return -0.5 * (x / spreads).square().sum(1)

    options = {"n_leapfrog": n_leapfrog, "target_acceptance": target_acceptance, "seed": 3}
    end = hmc(
        Target(log_density=log_density), start(64, 20), step_size=guess, n_steps=300,
        n_warmup=400, **options,
    )  # fmt: skip
    assert float(end.acceptance.mean()) == pytest.approx(target_acceptance, abs=0.04)
    assert float(end.step_size.log().std()) < 0.3  # chains of one law settle near one h
    assert len(end.step_size.unique()) > 32  # each its own


def test_steps_are_frozen_after_the_warm_up():
    """Continuing with the sizes of the warm-up, and none of it, gives the same chains."""
    x = start(6, 4)
    whole = hmc(GAUSSIAN, x, step_size=0.2, n_warmup=30, n_steps=20, seed=1)
    warm = hmc(GAUSSIAN, x, step_size=0.2, n_warmup=30, n_steps=0, seed=1)
    rest = hmc(
        GAUSSIAN, warm.x, step_size=warm.step_size, n_steps=20, seed=1, first_step=warm.next_step
    )
    assert torch.equal(whole.x, rest.x)
    assert torch.equal(whole.step_size, rest.step_size)
    assert torch.equal(whole.acceptance, rest.acceptance)
    assert (warm.next_step, rest.next_step) == (30, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 2)])
def test_a_chain_does_not_depend_on_its_batch(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, *shape, generator=generator).to(dtype)
    target = Target(log_density=lambda x: -x.reshape(len(x), -1).square().square().sum(1))
    for sampler in (ula, mala, hmc):
        options = {"step_size": 0.1, "n_steps": 6, "n_warmup": 5, "seed": 2}
        together = sampler(target, x, **options)
        assert together.x.dtype == dtype
        assert together.x.shape == x.shape
        for i in (0, 3, 6):
            alone = sampler(target, x[i : i + 1], samples=torch.tensor([i]), **options)
            for field in ("x", "acceptance", "accepted", "nonfinite", "step_size"):
                assert torch.equal(getattr(alone, field)[0], getattr(together, field)[i]), field
        other = sampler(target, x, **{**options, "seed": 3})
        assert not torch.equal(other.x, together.x)


def test_states_are_every_thinth_after_the_warm_up():
    x = start(3, 2)
    options = {"step_size": 0.4, "n_warmup": 4, "seed": 1}
    all_states = hmc(GAUSSIAN, x, n_steps=7, thin=1, **options).states
    assert all_states.shape == (7, 3, 2)
    for sampler_thin, kept in ((3, [2, 5]), (7, [6]), (8, [])):
        states = hmc(GAUSSIAN, x, n_steps=7, thin=sampler_thin, **options).states
        assert torch.equal(states, all_states[kept])
    for n in (2, 7):
        end = hmc(GAUSSIAN, x, n_steps=n, **options)
        assert end.states is None
        assert torch.equal(end.x, all_states[n - 1])


def test_hard_walls_and_wild_steps():
    """Where the density is 0 nothing is accepted; NaN never gets into a chain."""

    def box(x):
        inside = (x.abs() < 1).all(1)
        return torch.where(inside, 0.0, -torch.inf)

    x = 0.9 * (2 * torch.rand(4000, 2, generator=torch.Generator().manual_seed(0)).double() - 1)
    end = mala(Target(log_density=box), x, step_size=0.7, n_steps=60)
    assert float(end.x.abs().max()) < 1
    assert_close_mean(end.x.square().flatten(), 1 / 3)
    assert int(end.nonfinite.sum()) > 0

    quartic = Target(log_density=lambda x: -x.pow(4).sum(1))
    wild = hmc(quartic, x[:50], step_size=30.0, n_steps=5)
    assert torch.equal(wild.x, x[:50])
    assert wild.nonfinite.tolist() == [5] * 50
    tamed = hmc(quartic, x[:50], step_size=30.0, n_warmup=150, n_steps=50)
    assert float(tamed.acceptance.mean()) > 0.4


def test_no_chains_and_no_steps():
    for sampler in (ula, mala, hmc):
        none = sampler(GAUSSIAN, start(0, 3), step_size=0.1, n_steps=2, n_warmup=1)
        assert none.x.shape == (0, 3)
        x = start(2, 3)
        still = sampler(GAUSSIAN, x, step_size=0.1, n_steps=0, thin=1)
        assert torch.equal(still.x, x)
        assert still.states.shape == (0, 2, 3)


def test_evaluations_are_counted():
    calls = []

    def score(x):
        calls.append(len(x))
        return -x

    for n_points in (2, 5):
        target = Target(score=score, n_points=n_points)
        for n_leapfrog in (1, 3):
            calls.clear()
            options = {"n_leapfrog": n_leapfrog, "n_warmup": 2, "n_steps": 4}
            assert hmc(target, start(3, 2), step_size=0.1, **options).nfe == len(calls)
    calls.clear()
    assert ula(target, start(3, 2), step_size=0.1, n_steps=4, n_warmup=2).nfe == len(calls)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"step_size": 0.0}, "step_size must be positive and finite; got 0.0"),
        ({"step_size": math.nan}, "step_size must be positive"),
        ({"step_size": torch.ones(3)}, r"step_size must be one or \(2,\); got \(3,\)"),
        ({"n_steps": -1}, "must be at least 0; got -1"),
        ({"n_leapfrog": 0}, "n_leapfrog >= 1"),
        ({"target_acceptance": 1.0}, r"target_acceptance in \(0, 1\)"),
        ({"seed": 2**32}, "seed must be in"),
        ({"first_step": 2**32 - 1}, "number of steps must be in"),
        ({"samples": torch.arange(3)}, r"samples must be \(2,\); got \(3,\)"),
        ({"x": torch.zeros(2, 1, dtype=torch.int64)}, "x must be floating point"),
        ({"x": torch.full((2, 1), torch.inf)}, "chain 0 starts where"),
    ],
)
def test_bad_arguments(options, text):
    arguments = {"x": torch.zeros(2, 1), "step_size": 0.1, "n_steps": 2, **options}
    with pytest.raises(ValueError, match=text):
        hmc(GAUSSIAN, **arguments)


def test_bad_targets():
    with pytest.raises(ValueError, match="needs a score, a log_density, or both"):
        Target()
    with pytest.raises(ValueError, match="n_points must be at least 2"):
        Target(score=torch.neg, n_points=1)
    assert dataclasses.replace(GAUSSIAN_SCORE, n_points=4).extra_nfe == 2
    assert GAUSSIAN.extra_nfe == 0

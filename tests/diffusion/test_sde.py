"""The SDEs against the figures of the papers' code, and against one another."""

import math

import numpy as np
import pytest
import torch

from ncsn_fast.diffusion.sde import VE, VP, SubVP

T = [1e-5, 1e-3, 1e-2, 0.1, 0.5, 0.9, 1.0]
TUTORIAL = VE(0.01, 22.0, "clean")
SONG = VE.power(25.0)
SDES = [VE(), VE(0.02, 9.0), TUTORIAL, SONG, VP(), VP(0.3, 7.0), SubVP()]
each = pytest.mark.parametrize("sde", SDES, ids=repr)


def test_the_tutorials_deviations():
    expected = [1.24071e-4, 1.245452e-3, 4.079247e-3, 0.01913389, 0.46893496, 10.19014, 21.99999773]
    np.testing.assert_allclose(TUTORIAL.std(np.array(T)), expected, rtol=5e-7, atol=5e-10)
    assert TUTORIAL.log_ratio == pytest.approx(7.69621264, abs=5e-9)
    g2 = [1.539479e-3, 1.563118e-3, 1.795376e-3, 7.174499e-3, 3.386334, 1598.335, 7449.9338]
    np.testing.assert_allclose(TUTORIAL.diffusion(np.array(T)) ** 2, g2, rtol=5e-7)


def test_songs_deviations():
    expected = [0.00316233, 0.03167374, 0.10163123, 0.37465710, 1.93080543, 7.13044266, 9.84521456]
    np.testing.assert_allclose(SONG.std(np.array(T)), expected, atol=5e-9)
    np.testing.assert_allclose(SONG.diffusion(np.array(T)), 25.0 ** np.array(T), rtol=1e-12)


def test_the_two_conventions_differ_by_the_smallest_variance():
    noised = VE(0.01, 22.0)
    t = np.array(T)
    np.testing.assert_allclose(
        noised.std(t) ** 2 - TUTORIAL.std(t) ** 2, 1e-4, rtol=1e-6, atol=1e-9
    )
    assert (noised.prior_std, VP().prior_std) == (pytest.approx(22.0, rel=1e-14), 1.0)
    assert TUTORIAL.prior_std == pytest.approx(21.99999773, abs=5e-9)


def test_vp_and_sub_vp():
    t = np.linspace(0.05, 1, 7)
    c = -(t**2) * 19.9 / 4 - t * 0.1 / 2
    for sde in (VP(), SubVP()):
        np.testing.assert_allclose(sde.mean_scale(t), np.exp(c), rtol=1e-12)
        np.testing.assert_allclose(sde.rate(t), -(0.1 + 19.9 * t) / 2, rtol=1e-12)
    np.testing.assert_allclose(VP().std(t), np.sqrt(1 - np.exp(2 * c)), rtol=1e-12)
    np.testing.assert_allclose(SubVP().std(t), 1 - np.exp(2 * c), rtol=1e-12)
    shrink = 1 - np.exp(-2 * 0.1 * t - 19.9 * t**2)
    np.testing.assert_allclose(SubVP().diffusion(t) ** 2, VP().beta(t) * shrink, rtol=1e-12)


@each
def test_the_moments_solve_their_equations(sde):
    """dm/dt = rate m and dv/dt = 2 rate v + g^2, by central differences."""
    t, step = np.linspace(0.02, 0.98, 25), 1e-5
    slope = (sde.mean_scale(t + step) - sde.mean_scale(t - step)) / (2 * step)
    np.testing.assert_allclose(slope, sde.rate(t) * sde.mean_scale(t), rtol=1e-6, atol=1e-12)
    v, growth = sde.std(t) ** 2, (sde.std(t + step) ** 2 - sde.std(t - step) ** 2) / (2 * step)
    np.testing.assert_allclose(growth, 2 * sde.rate(t) * v + sde.diffusion(t) ** 2, rtol=1e-6)


@pytest.mark.parametrize("sde", [TUTORIAL, SONG, VP(), SubVP()], ids=repr)
def test_deviations_hold_at_small_times(sde):
    """v(t) = g(0)^2 t, or for sub-VP (beta_min t)^2, to leading order: no cancellation."""
    t = 1e-12
    leading = 0.1 * t if isinstance(sde, SubVP) else float(sde.diffusion(1e-15)) * math.sqrt(t)
    assert sde.std(t) == pytest.approx(leading, rel=1e-9)


@each
def test_numbers_arrays_and_tensors_agree(sde):
    for name in ("rate", "diffusion", "mean_scale", "std"):
        function = getattr(sde, name)
        tensor = function(torch.tensor(T, dtype=torch.float64))
        assert tensor.dtype == torch.float64
        np.testing.assert_allclose(tensor.numpy(), function(np.array(T)), rtol=1e-14)
        np.testing.assert_allclose([function(t) for t in T], function(np.array(T)), rtol=1e-14)
        assert function(torch.tensor(T)).dtype == torch.float32


@each
@pytest.mark.parametrize("kind", ["one", "each"])
def test_drifts(sde, kind):
    x, score = torch.randn(2, 3, 2, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64) if kind == "each" else 0.4
    mean, std = sde.marginal(x, t)
    for i in range(3):
        at = float(t[i]) if kind == "each" else t
        f, g = sde.rate(at) * x[i], sde.diffusion(at)
        torch.testing.assert_close(sde.drift(x, t)[i], f)
        torch.testing.assert_close(sde.reverse_drift(x, score, t)[i], f - g**2 * score[i])
        torch.testing.assert_close(sde.flow_drift(x, score, t)[i], f - 0.5 * g**2 * score[i])
        torch.testing.assert_close(mean[i], sde.mean_scale(at) * x[i])
        assert float(std[i] if kind == "each" else std) == pytest.approx(sde.std(at))


@each
def test_the_flow_keeps_gaussian_marginals(sde):
    """Data N(m, s^2): the flow moves quantiles, so m(t) m + q sqrt(m(t)^2 s^2 + v(t)) solves it."""
    m, s, q, t, step = 0.3, 0.7, -1.3, 0.4, 1e-5

    def path(t):
        return sde.mean_scale(t) * m + q * np.sqrt((sde.mean_scale(t) * s) ** 2 + sde.std(t) ** 2)

    x = path(np.array([t]))
    variance = (sde.mean_scale(t) * s) ** 2 + sde.std(t) ** 2
    score = -(x - sde.mean_scale(t) * m) / variance
    slope = (path(t + step) - path(t - step)) / (2 * step)
    np.testing.assert_allclose(sde.flow_drift(x, score, t), slope, rtol=1e-6)


@each
def test_prior_density(sde):
    x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1)).double() - 2.3
    normal = torch.distributions.Normal(0.0, sde.prior_std)
    expected = normal.log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(sde.prior_log_density(x), expected)


def test_discretisations():
    ve = VE().discretise(1000)
    ladder = np.geomspace(0.01, 50, 1000)
    np.testing.assert_allclose(np.cumsum(ve.g**2), ladder**2, rtol=1e-10)
    assert (ve.rate == 0).all()
    assert ve.g[0] == pytest.approx(0.01)
    vp = VP().discretise(1000, 1e-3)
    beta = np.linspace(0.1 / 1000, 20 / 1000, 1000)
    np.testing.assert_allclose(1 + vp.rate, np.sqrt(1 - beta), rtol=1e-14)
    np.testing.assert_allclose(vp.g, np.sqrt(beta), rtol=1e-14)
    sub = SubVP().discretise(100, 1e-3)
    np.testing.assert_allclose(sub.g, SubVP().diffusion(sub.t) / 10, rtol=1e-14)
    np.testing.assert_allclose(sub.rate, SubVP().rate(sub.t) / 100, rtol=1e-14)
    assert (sub.t[0], sub.t[-1], VE().discretise(1, 0.1).t.tolist()) == (1e-3, 1.0, [1.0])


@pytest.mark.parametrize("sde", [VE(), VP(), SubVP()], ids=repr)
def test_chains_tend_to_their_sde(sde):
    """Variance of the chain from data of variance s^2 = .25, against the marginal at t = 1."""

    def end(n):
        v = 0.25
        chain = sde.discretise(n)
        for rate, g in zip(chain.rate, chain.g, strict=True):
            v = (1 + rate) ** 2 * v + g**2
        return v

    exact = sde.mean_scale(1.0) ** 2 * 0.25 + sde.std(1.0) ** 2
    coarse, fine = abs(end(2000) - exact), abs(end(4000) - exact)
    assert fine <= max(0.51 * coarse, 1e-9 * exact)  # of first order, and VE's exact
    assert fine < 2e-3


def test_a_ladder_is_an_sde():
    sde = VE.from_sigmas(torch.tensor([3.0, 0.9, 0.1]))
    assert (sde.sigma_max, sde.start) == (3.0, "noised")
    assert sde.sigma_min == pytest.approx(0.1)
    assert sde.std(0.5) == pytest.approx(math.sqrt(0.3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: VE(0.0, 1.0), "expected 0 < sigma_min < sigma_max; got 0.0 and 1.0"),
        (lambda: VE(1.0, 1.0), "got 1.0 and 1.0"),
        (lambda: VE(0.1, math.nan), "got 0.1 and nan"),
        (lambda: VE(start="dirty"), "'noised' or 'clean'; got 'dirty'"),
        (lambda: VE.power(1.0), "base must be greater than 1; got 1.0"),
        (lambda: VE.from_sigmas([0.3]), "at least two sigmas; got one"),
        (lambda: VE.from_sigmas([0.3, 0.5]), "sigmas must be descending"),
        (lambda: VP(0.0, 1.0), "expected 0 < beta_min <= beta_max; got 0.0 and 1.0"),
        (lambda: VP(3.0, 1.0), "got 3.0 and 1.0"),
        (lambda: VE().discretise(0), "steps must be at least 1; got 0"),
        (lambda: VE().discretise(3, 1.0), r"t_end must be in \[0, 1\); got 1.0"),
        (lambda: VP().discretise(20), "more than beta_max = 20 steps; got 20"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()

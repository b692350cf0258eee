"""Euler-Maruyama, reverse diffusion and ancestral sampling on Gaussian data, in closed form."""

import numpy as np
import pytest
from gaussian import Data, moments

from ncsn_fast.diffusion.sde import VE, VP, SubVP
from ncsn_fast.samplers.few_step import euler
from ncsn_fast.samplers.reverse_sde import (
    ancestral,
    euler_maruyama,
    reverse_diffusion,
    vp_ancestral,
    vp_reverse_diffusion,
)

TUTORIAL, SONG = VE(0.01, 22.0, "clean"), VE.power(25.0)
DATA = Data(mean=0.5)


@pytest.mark.parametrize(
    ("sde", "n", "mean", "denoised", "noisy"),
    [
        (TUTORIAL, 50, None, 0.2519262, 0.2519581),
        (TUTORIAL, 500, 0.49977079, 0.2500148969, 0.2500180263),
        (TUTORIAL, 1000, None, 0.2500031806, 0.2500047438),
        (SONG, 50, None, 0.2212482, 0.2417677),
        (SONG, 500, 0.49876756, 0.2479859152, 0.2500008492),
    ],
)
def test_the_tutorials_moments(sde, n, mean, denoised, noisy):
    digits = 5e-8 if n == 50 else 5e-11
    for denoise, expected in ((True, denoised), (False, noisy)):
        program = euler_maruyama(sde, n, denoise=denoise)
        found, variance = moments(program, DATA)
        assert variance == pytest.approx(expected, abs=digits)
        assert mean is None or found == pytest.approx(mean, abs=5e-9)
        assert (program.nfe, program.initial) == (n, "prior")


@pytest.mark.parametrize(
    ("variance", "n", "denoised", "noisy", "by_ancestral", "flow"),
    [
        (0.25, 1000, 0.252043, 0.252143, 0.247782, 0.258879),
        (0.25, 100, 0.272692, None, 0.229590, 0.355718),
        (0.25, 2000, 0.250968, None, 0.248839, 0.254386),
        (0.0625, 1000, 0.062936, None, 0.061872, 0.065108),
    ],
)
def test_chains_of_the_score_sde_code(variance, n, denoised, noisy, by_ancestral, flow):
    ladder, data = np.geomspace(50, 0.01, n), Data(variance=variance)

    def end(program):
        assert program.nfe == n
        return moments(program, data)[1]

    assert end(reverse_diffusion(ladder)) == pytest.approx(denoised, abs=5e-7)
    assert end(ancestral(ladder)) == pytest.approx(by_ancestral, abs=5.1e-7)
    assert end(reverse_diffusion(ladder, flow=True)) == pytest.approx(flow, abs=5e-7)
    if noisy:
        assert end(reverse_diffusion(ladder, denoise=False)) == pytest.approx(noisy, abs=5e-7)


LADDER = np.array([7.0, 3.1, 0.8, 0.05])


def test_reverse_diffusion_is_its_formula():
    after = np.array([3.1, 0.8, 0.05, 0.0])
    g2 = LADDER**2 - after**2
    program = reverse_diffusion(LADDER)
    np.testing.assert_allclose(program.b, g2 / LADDER, rtol=1e-14)
    np.testing.assert_allclose(program.c, np.append(np.sqrt(g2[:3]), 0), rtol=1e-14)
    assert program.b[-1] == pytest.approx(0.05)  # the posterior mean
    assert reverse_diffusion(LADDER, denoise=False).c[-1] == pytest.approx(0.05)
    flow = reverse_diffusion(LADDER, flow=True)
    np.testing.assert_allclose(flow.b, g2 / LADDER / 2, rtol=1e-14)
    assert (flow.c == 0).all()
    assert flow.level.tolist() == [0, 1, 2, 3]


def test_ancestral_sampling_is_its_formula():
    after = np.array([3.1, 0.8, 0.05, 0.0])
    program = ancestral(LADDER)
    np.testing.assert_allclose(program.b, (LADDER**2 - after**2) / LADDER, rtol=1e-12)
    expected = after * np.sqrt((LADDER**2 - after**2) / LADDER**2)
    np.testing.assert_allclose(program.c, expected, rtol=1e-12)
    noisy = ancestral(LADDER, denoise=False)
    assert noisy.nfe == 3
    np.testing.assert_array_equal(noisy.b, program.b[:3])


def test_ancestral_sampling_without_noise_is_eulers_method():
    for denoise in (True, False):
        program, expected = ancestral(LADDER, 0.0, denoise=denoise), euler(LADDER, denoise=denoise)
        np.testing.assert_array_equal(program.b, expected.b)
        assert (program.c == 0).all()


@pytest.mark.parametrize("eta", [0.3, 1.0, 1.7, 50.0])
def test_ancestral_sampling_of_a_point_has_variance_sigma_squared(eta):
    for n in range(1, 4):
        program = ancestral(LADDER[: n + 1], eta, denoise=False)
        _, variance = moments(program, Data(mean=0.4, variance=0.0), mean=0.4)
        assert variance == pytest.approx(LADDER[n] ** 2, rel=1e-12)
    np.testing.assert_array_less(
        ancestral(LADDER, eta).c, np.append(LADDER[1:], 1e-300) * 1.0000001
    )


@pytest.mark.parametrize("sde", [VP(), SubVP(), VP(0.5, 12.0)], ids=repr)
@pytest.mark.parametrize("method", ["em", "reverse", "ancestral"])
@pytest.mark.parametrize("denoise", [False, True])
def test_vp_chains_find_their_data(sde, method, denoise):
    """The moments at t_end are the marginal's, up to the step: of first order in 1 / n."""
    build = {"em": euler_maruyama, "reverse": vp_reverse_diffusion, "ancestral": vp_ancestral}
    if method == "ancestral" and isinstance(sde, SubVP):
        return

    def miss(n):
        t = np.linspace(1, 1e-5, n)
        data = Data(mean=0.6, variance=0.3, scale=sde.mean_scale(t))
        program = build[method](sde, n, t_end=1e-5, denoise=denoise)
        assert (program.nfe, program.name, program.initial) == (n, method, "prior")
        np.testing.assert_array_equal(program.sigma, sde.std(t))
        start = sde.mean_scale(1.0) * 0.6, sde.mean_scale(1.0) ** 2 * 0.3 + sde.std(1.0) ** 2
        mean, variance = moments(program, data, *start)
        return mean - 0.6, variance - 0.3

    coarse, fine = miss(1000), miss(4000)
    np.testing.assert_allclose(fine, 0, atol=3e-4)
    np.testing.assert_allclose(fine, np.array(coarse) / 4, rtol=0.1, atol=1e-5)


def test_vp_tables_are_their_formulas():
    sde, n = VP(), 40
    t, beta = np.linspace(1, 1e-3, n), np.linspace(0.1 / n, 20 / n, n)[::-1]
    reverse, by_ancestral = vp_reverse_diffusion(sde, n), vp_ancestral(sde, n)
    np.testing.assert_allclose(reverse.a, 2 - np.sqrt(1 - beta), rtol=1e-13)
    np.testing.assert_allclose(reverse.b, beta / sde.std(t), rtol=1e-13)
    np.testing.assert_allclose(reverse.c[:-1], np.sqrt(beta[:-1]), rtol=1e-13)
    np.testing.assert_allclose(by_ancestral.a, 1 / np.sqrt(1 - beta), rtol=1e-13)
    np.testing.assert_allclose(by_ancestral.b, beta / sde.std(t) / np.sqrt(1 - beta), rtol=1e-13)
    np.testing.assert_allclose(by_ancestral.c[:-1], np.sqrt(beta[:-1]), rtol=1e-13)
    assert reverse.c[-1] == by_ancestral.c[-1] == 0
    noisy = vp_ancestral(sde, n, denoise=False)
    assert noisy.c[-1] == pytest.approx(np.sqrt(0.1 / n))
    flow = vp_reverse_diffusion(SubVP(), n, flow=True)
    g2 = SubVP().diffusion(t) ** 2 / n
    np.testing.assert_allclose(flow.b, g2 / SubVP().std(t) / 2, rtol=1e-13)
    np.testing.assert_allclose(flow.a, 1 + VP().beta(t) / 2 / n, rtol=1e-13)
    delta = (1 - 1e-3) / (n - 1)
    em = euler_maruyama(sde, n)
    np.testing.assert_allclose(em.a, 1 + sde.beta(t) / 2 * delta, rtol=1e-13)
    np.testing.assert_allclose(em.b, sde.beta(t) * delta / sde.std(t), rtol=1e-13)
    np.testing.assert_allclose(em.c[:-1], np.sqrt(sde.beta(t) * delta)[:-1], rtol=1e-13)


def test_one_step():
    program = euler_maruyama(TUTORIAL, 1)
    assert (program.nfe, program.c.tolist()) == (1, [0.0])
    g2 = TUTORIAL.diffusion(1.0) ** 2
    assert program.b[0] == pytest.approx(g2 * (1 - 1e-3) / TUTORIAL.prior_std)
    for one in (reverse_diffusion([0.3]), ancestral([0.3])):
        assert (one.nfe, one.b.tolist(), one.c.tolist()) == (1, [0.3], [0.0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: euler_maruyama(VE(), 0), "steps must be at least 1; got 0"),
        (lambda: euler_maruyama(VE(), 5, t_end=1.0), r"t_end must be in \[0, 1\); got 1.0"),
        (lambda: euler_maruyama(VP(), 5, t_end=0.0), "t_end must be positive for this SDE"),
        (lambda: euler_maruyama(TUTORIAL, 5, t_end=0.0), "t_end must be positive for this SDE"),
        (lambda: reverse_diffusion([1.0, 2.0]), "sigmas must be descending"),
        (lambda: reverse_diffusion([]), "non-empty vector"),
        (lambda: ancestral([2.0, 1.0], -0.1), "eta must be at least 0; got -0.1"),
        (lambda: ancestral([2.0, 1.0], np.nan), "eta must be at least 0; got nan"),
        (lambda: ancestral([2.0], denoise=False), "leave no step; give more steps"),
        (lambda: vp_reverse_diffusion(VP(), 20), "more than beta_max = 20 steps; got 20"),
        (lambda: vp_reverse_diffusion(SubVP(), 0), "steps must be at least 1; got 0"),
        (lambda: vp_ancestral(SubVP(), 100), "sub-VP has none"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()

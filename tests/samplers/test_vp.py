"""VP and sub-VP models from Python: their tables on a score, and what `as_ve` makes of them."""

import math
import textwrap

import exact
import gaussian
import numpy as np
import pytest
import torch
from scipy.stats import chi2

from ncsn_fast.diffusion.sde import VE, VP, SubVP
from ncsn_fast.evaluation.likelihood import log_likelihood
from ncsn_fast.samplers import vp
from ncsn_fast.samplers.adaptive import adaptive
from ncsn_fast.samplers.ode import probability_flow
from ncsn_fast.samplers.predictor_corrector import predictor_corrector
from ncsn_fast.samplers.procedure import contract_noise, per_sample
from ncsn_fast.samplers.program import Chains, initial_state, run
from ncsn_fast.samplers.reverse_sde import euler_maruyama, vp_ancestral, vp_reverse_diffusion
from ncsn_fast.samplers.runge_kutta import solve
from ncsn_fast.samplers.vp import as_ve, rows

SDES = [VP(), SubVP(), VP(0.4, 9.0), VP(3.0, 3.0)]
each = pytest.mark.parametrize("sde", SDES, ids=repr)
MEAN, SPREAD = 0.3, 0.5  # of the data


def time_score(sde):
    """Score of m(t) N(MEAN, SPREAD^2) + std(t) z, from the SDE itself."""

    def score(x, t):
        assert t.shape == (len(x),)
        assert float(t.min()) >= 0
        assert float(t.max()) <= 1
        m, std = sde.mean_scale(t.double()), sde.std(t.double())
        return -(x - per_sample(m * MEAN, x)) / per_sample((m * SPREAD) ** 2 + std**2, x)

    return score


def density_at(sde, x, t):
    """log p_t(x) in nats, (B,) float64."""
    m, std = sde.mean_scale(t), sde.std(t)
    return exact.Gaussian(m * MEAN, m * SPREAD).log_density(x, std)


@pytest.mark.parametrize("sde", [*SDES, VE(), VE(0.02, 9.0, "clean"), VE.power(25.0)], ids=repr)
@pytest.mark.parametrize("kind", ["number", "array", "tensor"])
def test_time_is_the_inverse_of_the_noise_level(sde, kind):
    t = np.array([1e-9, 1e-5, 1e-3, 0.07, 0.5, 0.93, 1.0])
    np.testing.assert_allclose(sde.noise_level(t), sde.std(t) / sde.mean_scale(t), rtol=1e-14)
    # Of VP's 1e-9 hardly a digit would be left in sqrt(1 + level^2).
    rtol = 1e-6 if sde == VE() else 1e-12  # log t does not hold digits of a small t
    level = sde.noise_level(t)
    if kind == "array":
        found = sde.time(level)
    elif kind == "tensor":
        found = sde.time(torch.from_numpy(level)).numpy()
    else:
        found = [sde.time(float(one)) for one in level]
    np.testing.assert_allclose(found, t, rtol=rtol, atol=1e-15)


TABLES = [
    (sde, build)
    for sde in SDES
    for build in (euler_maruyama, vp_reverse_diffusion, vp_ancestral)
    if not (build is vp_ancestral and isinstance(sde, SubVP))  # which has none
]


@pytest.mark.parametrize(
    ("sde", "build"), TABLES, ids=lambda value: getattr(value, "__name__", repr(value))
)
@pytest.mark.parametrize("t_end", [1e-3, 0.2])
def test_tables_on_a_score(sde, build, t_end):
    """MicroBatch mean and variance of 65536 pixels are those of the table's recursion."""
    n, samples = 60, torch.arange(64)
    program = build(sde, n, t_end=t_end)
    x = initial_state(program, 3, samples, (1, 16, 64))
    run(program, rows(time_score(sde), sde, n, t_end), chains := Chains(x, 3, samples))
    data = gaussian.Data(MEAN, SPREAD**2, sde.mean_scale(np.linspace(1, t_end, n)))
    mean, variance = gaussian.moments(program, data)
    x = chains.x.double().flatten()
    assert abs(float(x.mean()) - mean) < 4.5 * math.sqrt(variance / len(x))
    low, high = chi2.ppf([5e-6, 1 - 5e-6], len(x) - 1) / (len(x) - 1)
    assert low < float(x.var()) / variance < high


@each
def test_as_ve_is_the_score_of_the_smoothed_data(sde):
    ve, data = as_ve(time_score(sde), sde), exact.Gaussian(MEAN, SPREAD)
    y = exact.normals(5, 2, 3, dtype=torch.float64)
    sigma = torch.tensor(np.geomspace(ve.sigma_min, ve.sigma_max, 5))
    torch.testing.assert_close(ve.score(y, sigma), data.score(y, sigma), rtol=1e-9, atol=1e-12)
    assert ve.score(y.float(), sigma.float()).dtype == torch.float32
    assert ve.sigma_max == pytest.approx(float(sde.std(1.0) / sde.mean_scale(1.0)))
    assert ve.prior_std == pytest.approx(1 / float(sde.mean_scale(1.0)))
    assert ve.mean_scale == pytest.approx(float(sde.mean_scale(1e-3)))


@each
def test_times_beyond_the_last_are_the_last(sde):
    """sigma_max may be a rounding above the level of t = 1; networks know no later time."""
    ve, y = as_ve(time_score(sde), sde), exact.normals(2, 3)
    sigma = torch.full((2,), ve.sigma_max)
    torch.testing.assert_close(ve.score(y, 1.01 * sigma), ve.score(y, sigma), rtol=1e-3, atol=0)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probability_flow(sde, dtype):
    """x(t_end) = m(t_end) (MEAN + q deviation of y) with the quantile q of x(1); NFE is counted."""
    calls = []

    def score(x, t):
        calls.append(len(x))
        return time_score(sde)(x, t)

    ve = as_ve(score, sde)
    x = exact.normals(3, 1, 4, 4, dtype=dtype)
    scale = float(sde.mean_scale(1.0))
    y, nfe = probability_flow(ve.score, x / scale, ve.sigma_max, ve.sigma_min, compact=False)
    before = math.hypot(scale * SPREAD, float(sde.std(1.0)))
    after = math.hypot(ve.mean_scale * SPREAD, float(sde.std(1e-3)))
    expected = ve.mean_scale * MEAN + (x - scale * MEAN) * after / before
    torch.testing.assert_close(ve.mean_scale * y, expected, rtol=0, atol=3e-5)
    assert int(nfe.max()) == len(calls)
    assert int(nfe.max()) < 150
    back, _ = probability_flow(ve.score, y, ve.sigma_min, ve.sigma_max)
    torch.testing.assert_close(scale * back, x, rtol=0, atol=3e-4)


@each
def test_it_is_the_flow_in_t(sde):
    """The SDE's own flow_drift, integrated in t, ends at the same place."""
    score, x = time_score(sde), exact.normals(2, 5, dtype=torch.float64)
    ve, scale = as_ve(score, sde), float(sde.mean_scale(1.0))
    in_t = solve(
        lambda t, x: sde.flow_drift(x, score(x, t), t), x, 1.0, 1e-3, rtol=1e-9, atol=1e-9
    ).y
    options = {"rtol": 1e-9, "atol": 1e-9}
    y, _ = probability_flow(ve.score, x / scale, ve.sigma_max, ve.sigma_min, **options)
    torch.testing.assert_close(ve.mean_scale * y, in_t, rtol=1e-6, atol=1e-7)


@each
def test_likelihood(sde):
    """log p(x(t_end)) of Gaussian data, with the prior that is exact and with N(0, I)."""
    ve, x = as_ve(time_score(sde), sde), 0.8 * exact.normals(4, 2, 3, 3, dtype=torch.float64)
    d, ends = 18, (ve.sigma_min, ve.sigma_max)
    tight = {"rtol": 1e-8, "atol": 1e-8}
    exactly = {"prior_mean": MEAN, "prior_std": math.hypot(SPREAD, ve.sigma_max), **tight}
    found = log_likelihood(ve.score, x / ve.mean_scale, *ends, **exactly)
    expected = density_at(sde, x, 1e-3)
    torch.testing.assert_close(
        -found.nll - d * math.log(ve.mean_scale), expected, rtol=0, atol=2e-6
    )
    # The range of the images, as y has it, makes bpd that of x.
    usual = log_likelihood(
        ve.score, x / ve.mean_scale, *ends, prior_std=ve.prior_std, **tight,
        data_range=(-1 / ve.mean_scale, 1 / ve.mean_scale),
    )  # fmt: skip
    scale = float(sde.mean_scale(1.0))
    shift = sde.prior_log_density(usual.latent * scale) - density_at(sde, usual.latent * scale, 1.0)
    bits = -(expected + shift) / (d * math.log(2)) + 7
    torch.testing.assert_close(usual.bpd, bits, rtol=0, atol=1e-6)
    assert torch.equal(usual.latent, found.latent)


@pytest.mark.parametrize("sde", [VP(), SubVP()], ids=repr)
@pytest.mark.parametrize("how", ["predictor_corrector", "adaptive"])
def test_other_samplers_of_ve_models(sde, how):
    """Moments of the data at t_end, from the prior."""
    ve, samples, shape = as_ve(time_score(sde), sde), torch.arange(8), (1, 32, 32)
    draw = contract_noise(5, samples, shape)
    y = ve.prior_std * draw(1, 0)
    if how == "adaptive":
        y = adaptive(ve.score, y, ve.sigma_min, ve.sigma_max, draw, rtol=0.005, atol=1e-3).x
    else:
        ladder = np.geomspace(ve.sigma_max, ve.sigma_min, 300)
        y = predictor_corrector(ve.score, y, ladder, draw, snr=0.05).x
    assert float(y.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(y.var()) == pytest.approx(SPREAD**2, rel=0.06)


def test_the_example_runs():
    """That at the head of the file, with a score whose images are known."""
    blocks = [part for part in vp.__doc__.split("\n\n") if part.startswith("    ")]
    scope = {"torch": torch, "score": time_score(VP())}
    torch.manual_seed(0)
    exec(textwrap.dedent("\n".join(blocks)), scope)
    for name in ("images", "flow"):
        x = scope[name]
        assert x.shape == (8, 3, 8, 8)
        assert float(x.mean()) == pytest.approx(MEAN, abs=0.1)
        assert float(x.std()) == pytest.approx(SPREAD, abs=0.1)
    assert torch.isfinite(scope["found"].bpd).all()


def test_refuses():
    for t_end in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"t_end must be in \(0, 1\); got"):
            as_ve(time_score(VP()), VP(), t_end)

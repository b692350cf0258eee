"""Likelihoods beside closed forms, and what the estimates of the divergence promise."""

import math

import exact
import pytest
import tiny
import torch

from ncsn_fast.evaluation.likelihood import dequantise, log_likelihood, probes, score_and_divergence
from ncsn_fast.samplers.procedure import per_sample
from ncsn_fast.samplers.runge_kutta import solve

RANGES = {
    "course": (exact.COURSE, 1e-3),
    "song": (exact.SONG, 1e-5),
    "vesde": (exact.VESDE, 1e-5),
}


def ends(name):
    """sigma_min and sigma_max of a published likelihood."""
    schedule, t = RANGES[name]
    return math.sqrt(float(schedule.variance(t))), math.sqrt(float(schedule.variance(1.0)))


def typical(data, *shape, dtype=torch.float64):
    """Points at the root mean square distance of the data from their mean."""
    z = exact.normals(*shape, dtype=dtype)
    radius = math.sqrt(z[0].numel())
    return data.mean + data.spread * z * per_sample(radius / z.flatten(1).norm(dim=1), z)


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("shape", [(3, 1), (2, 7), (2, 3, 8, 8)])
def test_gaussian_data_have_the_printed_bits_per_dimension(name, shape):
    """log2(2 pi e / 4) / 2 + 8 = 9.047096 in any dimension, with the prior that is exact."""
    data, (low, high) = exact.Gaussian(mean=0.5, spread=0.5), ends(name)
    x = typical(data, *shape)
    prior = {"prior_mean": data.mean, "prior_std": math.hypot(data.spread, high)}
    found = log_likelihood(data.score, x, low, high, **prior)
    torch.testing.assert_close(-found.nll, data.log_density(x, low), rtol=5e-5, atol=1e-4)
    smoothing = 0.5 * math.log2(1 + (low / data.spread) ** 2)  # at most 3e-4
    assert (found.bpd - 9.047096).abs().max() < smoothing + 5e-5
    assert found.bpd.shape == found.nll.shape == found.nfe.shape == (shape[0],)
    torch.testing.assert_close(found.latent, data.flow(x, low, high), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.log_prior + found.log_volume, -found.nll)


@pytest.mark.parametrize("name", ["course", "song"])
def test_the_usual_prior_shifts_bits_by_little(name):
    """N(0, sigma_max^2) for N(m, s^2 + sigma_max^2): some 1e-3 bits, in closed form."""
    data, (low, high) = exact.Gaussian(mean=0.5, spread=0.5), ends(name)
    x = typical(data, 2, 64)
    x = torch.cat((x, 2 * data.mean - x))  # so that their mean is that of the data
    prior = {"prior_mean": data.mean, "prior_std": math.hypot(data.spread, high)}
    better = log_likelihood(data.score, x, low, high, **prior)
    usual = log_likelihood(data.score, x, low, high)
    latent = better.latent
    ratio = data.spread**2 / high**2
    nats = (latent / high).square() - ((latent - data.mean) / prior["prior_std"]).square()
    shift = 0.5 * (nats.mean(1) - math.log1p(ratio)) / math.log(2)
    torch.testing.assert_close(usual.bpd - better.bpd, shift, rtol=0, atol=1e-9)
    assert 1e-4 < abs(shift.mean()) < 3e-3


@pytest.mark.parametrize(("name", "nfe"), [("course", 98), ("song", 62)])
def test_tutorials_evaluations(name, nfe):
    """Position and volume of 784 pixels in the tutorials' time, tolerances 1e-5: their NFE."""
    schedule, start = RANGES[name]
    data = exact.Gaussian(mean=0.5, spread=0.5)

    def slope(t, state):
        x, sigma = state[:, :-1], schedule.variance(t).sqrt()
        divergence = -x.shape[1] / (data.spread**2 + sigma**2)
        change = torch.cat((data.score(x, sigma), divergence[:, None]), dim=1)
        return -0.5 * per_sample(schedule.g2(t), x) * change

    x = data.mean + data.spread * exact.normals(4, 784, dtype=torch.float64)
    found = solve(slope, torch.cat((x, torch.zeros(4, 1).double()), dim=1), start, 1.0)
    assert (found.nfe - nfe).abs().max() <= 6


def test_uniform_data_have_eight_bits():
    """p_sigma(x) = Phi(x / sigma) - Phi((x - 1) / sigma); inside [0, 1) that is 1."""

    def log_density(x, sigma):
        sigma = per_sample(sigma, x)
        normal = torch.special.ndtr
        # From the nearer side, so that no difference cancels.
        lower, upper = (x - 0.5).abs() - 0.5, (x - 0.5).abs() + 0.5
        return (normal(-lower / sigma) - normal(-upper / sigma)).log()

    def score(x, sigma):
        with torch.enable_grad():
            inner = x if x.requires_grad else x.detach().requires_grad_()
            total = log_density(inner, sigma).sum()
            return torch.autograd.grad(total, inner, create_graph=True)[0]

    x = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)[:, None].repeat(1, 3)
    prior = {"prior_mean": 0.5, "prior_std": math.sqrt(22.0**2 + 1 / 12)}
    found = log_likelihood(score, x, 0.01, 22.0, trace="exact", **prior)
    torch.testing.assert_close(found.bpd, torch.full((6,), 8.0).double(), rtol=0, atol=2e-4)


WEIGHTS = torch.tensor([0.8, 0.2], dtype=torch.float64)
CENTRES = torch.tensor([[5.0, 5.0], [-5.0, -5.0]], dtype=torch.float64)


def mixture_log_density(x, sigma):
    variance = (1 + sigma**2)[:, None]
    squares = (x[:, None] - CENTRES).square().sum(-1)
    return (WEIGHTS.log() - squares / (2 * variance) - (2 * math.pi * variance).log()).logsumexp(1)


def mixture_score(x, sigma):
    variance = (1 + sigma**2)[:, None]
    gaps = CENTRES - x[:, None]
    chances = (WEIGHTS.log() - gaps.square().sum(-1) / (2 * variance)).softmax(1)
    return (chances[..., None] * gaps).sum(1) / variance


def test_a_mixture_of_two_modes():
    """The toy data of the 2019 paper: far from Gaussian, and the Jacobian is not diagonal."""
    x = torch.tensor([[5.0, 5.0], [-5.0, -4.0], [0.0, 0.3], [-1.0, 1.0], [7.0, 3.0]]).double()
    centre = WEIGHTS @ CENTRES
    spread = {"prior_mean": centre, "prior_std": math.hypot(2000.0, 5.0)}
    options = {"rtol": 1e-8, "atol": 1e-8, **spread}
    found = log_likelihood(mixture_score, x, 0.01, 2000.0, trace="exact", **options)
    expected = mixture_log_density(x, torch.full((5,), 0.01).double())
    torch.testing.assert_close(-found.nll, expected, rtol=0, atol=1e-4)


def coupled(x, sigma):
    """A linear score with a full Jacobian: -A x, A of size 6."""
    return -x @ coupling().to(x.dtype)


def coupling():
    a = exact.normals(6, 6, seed=3, dtype=torch.float64)
    return a @ a.T


@pytest.mark.parametrize("trace", ["rademacher", "gaussian"])
def test_estimates_have_the_mean_and_variance_of_theory(trace):
    """tr A, and 2 |A|^2 for Gaussian probes, 2 (|A|^2 - sum of a_ii^2) for Rademacher ones."""
    a, x, n = coupling(), torch.zeros(20_000, 6, dtype=torch.float64), 20_000
    v = probes(trace, 1, x, 0, torch.arange(n))
    _, estimate = score_and_divergence(coupled, x, torch.ones(n), v)
    variance = 2 * a.square().sum()
    if trace == "rademacher":
        variance -= 2 * a.diagonal().square().sum()
    assert abs(estimate.mean() + a.trace()) < 4.5 * math.sqrt(variance / n)
    assert float(estimate.var() / variance) == pytest.approx(1, rel=0.1)


def test_rademacher_is_exact_where_the_jacobian_is_a_multiple_of_one():
    data = exact.Gaussian()
    x = typical(data, 4, 3, 5, 5)
    one, more, full = (
        log_likelihood(data.score, x, 0.01, 20.0, **o)
        for o in ({}, {"n_probes": 3, "seed": 9}, {"trace": "exact"})
    )
    torch.testing.assert_close(one.nll, full.nll, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(more.nll, full.nll, rtol=1e-9, atol=1e-9)
    gaussian = log_likelihood(data.score, x, 0.01, 20.0, trace="gaussian")
    assert (gaussian.nll - full.nll).abs().min() > 1e-3  # only unbiased


def test_more_probes_err_less():
    data, x = exact.Gaussian(), torch.zeros(64, 12, dtype=torch.float64)
    full = log_likelihood(data.score, x, 0.01, 20.0, trace="exact")
    spread = [
        (log_likelihood(data.score, x, 0.01, 20.0, trace="gaussian", n_probes=n).nll - full.nll)
        .square().mean().sqrt()
        for n in (1, 16)
    ]  # fmt: skip
    assert 2.5 < float(spread[0] / spread[1]) < 6


def test_a_sample_keeps_its_likelihood_in_any_batch():
    data = exact.Gaussian()
    x, samples = typical(data, 4, 9), torch.tensor([40, 41, 7, 3])
    options = {"trace": "gaussian", "seed": 5}
    together = log_likelihood(data.score, x, 0.01, 20.0, samples=samples, **options)
    for row in range(4):
        alone = log_likelihood(
            data.score, x[row : row + 1], 0.01, 20.0, samples=samples[row : row + 1], **options
        )
        assert torch.equal(alone.nll[0], together.nll[row])
    default = log_likelihood(data.score, x, 0.01, 20.0, **options)
    assert torch.equal(
        default.nll,
        log_likelihood(data.score, x, 0.01, 20.0, samples=torch.arange(4), **options).nll,
    )


@pytest.mark.parametrize(("bits", "data_range", "added"), [
    (8, (0.0, 1.0), 8.0), (8, (-1.0, 1.0), 7.0), (5, (0.0, 1.0), 5.0), (8, (0.0, 256.0), 0.0),
])  # fmt: skip
def test_bits_and_range_say_what_a_grey_level_is(bits, data_range, added):
    data, x = exact.Gaussian(), torch.full((1, 6), 0.25)
    found = log_likelihood(data.score, x, 0.1, 20.0, bits=bits, data_range=data_range)
    assert float(found.bpd - found.nll / (6 * math.log(2))) == pytest.approx(added)


def test_bits_do_not_depend_on_the_units():
    """The same data in [0, 1] and in [-1, 1], all noise doubled: the same bits."""
    k = torch.randint(256, (3, 1, 4, 4), generator=torch.Generator().manual_seed(1))
    unit, centred = exact.Gaussian(0.5, 0.25), exact.Gaussian(0.0, 0.5)
    first = log_likelihood(unit.score, dequantise(k).double(), 0.01, 20.0)
    x = dequantise(k, data_range=(-1.0, 1.0)).double()
    second = log_likelihood(centred.score, x, 0.02, 40.0, data_range=(-1.0, 1.0), prior_mean=-1.0)
    torch.testing.assert_close(first.bpd, second.bpd, rtol=0, atol=1e-5)


def test_dequantised_data_lie_in_their_level():
    k = torch.arange(256, dtype=torch.uint8).reshape(2, 1, 8, 16)
    x = dequantise(k, seed=3)
    assert x.dtype == torch.float32
    assert torch.equal((x * 256).floor().to(torch.uint8), k)
    u = x.double() * 256 - k
    assert 0.4 < float(u.mean()) < 0.6
    assert not torch.equal(u[0], u[1])
    again = dequantise(k[1:], seed=3, samples=torch.tensor([1]))
    assert torch.equal(again[0], x[1])
    assert dequantise(k[:0]).shape == (0, 1, 8, 16)


@pytest.mark.parametrize("arch", ["ncsnv2", "ncsn"])
def test_a_network(arch):
    """ScoreModel.score in float32, inside inference mode too; the trace is that of its Jacobian."""
    model = tiny.model(arch=arch, image_size=(4, 4), sigma_begin=1.0, n_sigmas=2)
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.5, 0.9])
    basis = probes("exact", 1, x, 0, torch.arange(2))
    score, divergence = score_and_divergence(model.score, x, sigma, basis)
    torch.testing.assert_close(score, model.score(x, sigma).detach())
    for row in range(2):
        jacobian = torch.autograd.functional.jacobian(
            lambda one, row=row: model.score(one, sigma[row]), x[row : row + 1]
        )
        trace = jacobian.reshape(16, 16).trace().double()
        torch.testing.assert_close(divergence[row], trace, rtol=1e-4, atol=1e-4)
    if arch == "ncsn":
        return  # its score jumps between levels: many small steps
    with torch.inference_mode():
        inside = log_likelihood(model.score, x.clone(), 0.3, 1.0, rtol=1e-3, atol=1e-3)
    outside = log_likelihood(model.score, x, 0.3, 1.0, rtol=1e-3, atol=1e-3)
    assert torch.equal(inside.nll, outside.nll)
    assert torch.isfinite(outside.bpd).all()
    assert outside.latent.dtype == torch.float32
    assert all(p.grad is None for p in model.parameters())


def test_empty_batch():
    found = log_likelihood(exact.Gaussian().score, torch.zeros(0, 1, 4, 4), 0.01, 1.0)
    assert found.nll.shape == found.bpd.shape == found.nfe.shape == (0,)


@pytest.mark.parametrize(("options", "message"), [
    ({"trace": "hutchinson"}, "trace must be"), ({"n_probes": 0}, "n_probes"),
    ({"bits": 0}, "bits"), ({"data_range": (1.0, 0.0)}, "data_range"),
    ({"prior_std": 0.0}, "prior_std"), ({"samples": torch.arange(3)}, r"samples.*\(2,\)"),
])  # fmt: skip
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        log_likelihood(exact.Gaussian().score, torch.zeros(2, 4), 0.01, 1.0, **options)


def test_refuses_levels_noise_and_scores_of_the_wrong_kind():
    data = exact.Gaussian()
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        log_likelihood(data.score, torch.zeros(2, 4), 1.0, 0.1)
    with pytest.raises(ValueError, match="differentiable"):
        log_likelihood(lambda x, sigma: data.score(x, sigma).detach(), torch.zeros(2, 4), 0.1, 1.0)
    with pytest.raises(ValueError, match=r"levels must be in \[0, 32\); got 0 .. 32"):
        dequantise(torch.tensor([[0, 32]]), bits=5)
    with pytest.raises(ValueError, match="integers"):
        dequantise(torch.zeros(1, 4))

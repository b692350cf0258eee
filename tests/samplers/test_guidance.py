"""Guides and constraints on data whose score, given anything, is known."""

import math

import exact
import numpy as np
import pytest
import torch

from ncsn_fast import ops
from ncsn_fast.diffusion.sde import VP, SubVP
from ncsn_fast.ops.noise import Stream
from ncsn_fast.samplers import few_step
from ncsn_fast.samplers.adaptive import adaptive
from ncsn_fast.samplers.constraints import ConstrainedUpdate
from ncsn_fast.samplers.guidance import (
    Both,
    Conditional,
    Imposed,
    Projected,
    Shrunk,
    classifier_gradient,
)
from ncsn_fast.samplers.langevin import annealed_langevin, consistent_annealed
from ncsn_fast.samplers.ode import probability_flow
from ncsn_fast.samplers.operators import Grey, Linear, Mask, Operator, block_mean, gaussian_blur
from ncsn_fast.samplers.predictor_corrector import predictor_corrector
from ncsn_fast.samplers.procedure import contract_noise, per_sample
from ncsn_fast.samplers.program import Chains, run
from ncsn_fast.samplers.program_transforms import inpainting
from ncsn_fast.samplers.reverse_sde import vp_ancestral, vp_reverse_diffusion

SHAPE, D = (3, 4, 4), 48
OPERATORS = {
    "mask": Mask(torch.arange(D).reshape(1, *SHAPE) % 3 == 0),
    "grey": Grey((0.299, 0.587, 0.114)),
    "block mean": block_mean(2, 4, 4),
    "blur": gaussian_blur(0.5, 4, 4),
    "own": Linear(lambda x: x[:, :, 1:] + 0.3 * x[:, :, :-1], SHAPE),
}
each = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def normals(*shape, seed=0):
    return exact.normals(*shape, seed=seed, dtype=torch.float64)


def dense(operator: Operator):
    """A as a matrix (M, D)."""
    eye = torch.eye(D, dtype=torch.float64).reshape(D, *SHAPE)
    return operator.apply(eye).flatten(1).T


class Correlated:
    """Data N(mean, covariance) of images, (D,) and (D, D); the score of x = m x_0 + sigma z."""

    def __init__(self, mean, covariance):
        self.mean, self.covariance = mean, covariance
        self.spectrum, self.axes = torch.linalg.eigh(covariance)

    def score(self, x, sigma, m=1.0):
        moved = (x.flatten(1).double() - m * self.mean) @ self.axes
        moved = moved / (m**2 * self.spectrum + sigma.double().square()[:, None])
        return -(moved @ self.axes.T).reshape(x.shape).to(x.dtype)

    def given(self, a, y, noise):
        """The data given y = A x + noise z, y (M,)."""
        gram = a @ self.covariance @ a.T + noise**2 * torch.eye(len(a), dtype=torch.float64)
        gain = self.covariance @ a.T @ torch.linalg.pinv(gram, rtol=1e-10)
        mean = self.mean + gain @ (y - a @ self.mean)
        return Correlated(mean, self.covariance - gain @ a @ self.covariance)


SPREAD = 0.4
ISOTROPIC = Correlated(normals(D, seed=8), SPREAD**2 * torch.eye(D, dtype=torch.float64))
SMOOTH = Correlated(
    0.3 * normals(D, seed=8),
    0.2 * torch.exp(-0.2 * (torch.arange(D)[:, None] - torch.arange(D)).abs().double())
    + 0.01 * torch.eye(D, dtype=torch.float64),
)


@each
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.7])
@pytest.mark.parametrize("sigma", [3.0, 0.5, 0.05])
def test_projected_scores_are_exact_on_isotropic_data(operator, noise, sigma):
    y = operator.apply(normals(1, *SHAPE, seed=2))
    guide = Projected(operator, y.expand(3, *y.shape[1:]), noise, SPREAD)
    x, level = 2 * normals(3, *SHAPE, seed=3), torch.full((3,), sigma, dtype=torch.float64)
    posterior = ISOTROPIC.given(dense(operator), y.flatten(), noise)
    found = guide.score(ISOTROPIC.score, x, level)
    expected = posterior.score(x, level)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 / sigma)


@each
def test_vp_guides_are_exact_on_isotropic_data(operator):
    y = operator.apply(normals(1, *SHAPE, seed=2)).expand(2, *[-1] * 3)
    x = normals(2, *SHAPE, seed=3)
    posterior = ISOTROPIC.given(dense(operator), y[0].flatten(), 0.1)
    for sde, scale in ((VP(), None), (SubVP(), lambda std: (1 - std).sqrt())):
        options = {} if scale is None else {"mean_scale": scale}
        guide = Shrunk(Projected(operator, y, 0.1, SPREAD), **options)
        for t in (0.05, 0.4, 0.9):
            m, std = float(sde.mean_scale(t)), torch.full((2,), float(sde.std(t))).double()
            found = guide.score(lambda x, s, m=m: ISOTROPIC.score(x, s, m), x, std)
            expected = posterior.score(x, std, m)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def network_of(program, score, guide=None):
    """The raw output sigma * score of each row, guided."""

    def network(x, k):
        sigma = torch.full((len(x),), float(program.sigma[k]), dtype=torch.float64)
        found = guide.score(score, x, sigma) if guide else score(x, sigma)
        return (program.sigma[k] * found).float()

    return network


def still():
    """Chains at 0 whose noise has no weight."""
    weights, samples = torch.zeros(2, 2), torch.arange(2)
    return Chains(x=torch.zeros(2, *SHAPE), seed=0, samples=samples, noise_weights=weights)


class Quiet(Imposed):
    """Imposes without the reference's noise."""

    def impose(self, x, sigma, z):
        return super().impose(x, sigma, None)


@each
@pytest.mark.parametrize("how", ["imposed ncsnv2", "imposed ncsn", "projected"])
def test_langevin_dynamics_tend_to_the_conditional_mean(operator, how):
    """That of noisy data: all is linear, so chains without noise follow the mean of those with it.

    A projected score pulls with 1 / sigma^2, so its steps must be of that size.
    """
    clean = SMOOTH.mean + normals(2, D, seed=4)
    y = operator.apply(clean.reshape(2, *SHAPE)).float()
    sigma, epsilon, n = (0.1, 0.01, 2000) if how == "projected" else (0.02, 0.02, 1000)
    program = annealed_langevin([sigma], epsilon, n, denoise=False)
    update, guide = None, None
    if how == "projected":
        guide = Projected(operator, y)
    else:
        program = inpainting(program, how.split()[1])
        update = ConstrainedUpdate(Quiet(operator, y))
    found = run(program, network_of(program, SMOOTH.score, guide), still(), update=update)
    a, eye = dense(operator), torch.eye(D, dtype=torch.float64)
    for row, measured in zip(found.double(), y.double(), strict=True):
        noisy = Correlated(SMOOTH.mean, SMOOTH.covariance + sigma**2 * eye)
        here = noisy.given(a, measured.flatten(), 0.0)
        torch.testing.assert_close(row.flatten(), here.mean, rtol=0, atol=1e-3)
        there = SMOOTH.given(a, measured.flatten(), 0.0)
        atol = 50 * sigma**2  # its limit
        torch.testing.assert_close(row.flatten(), there.mean, rtol=0, atol=atol)
        assert (here.mean - SMOOTH.mean).abs().max() > 0.3


LADDER = np.geomspace(5.0, 0.02, 12)


def by_table(program):
    def sample(score, x, samples):
        chains = Chains(x=x.clone(), seed=3, samples=samples)
        return run(program, network_of(program, score), chains)

    return sample


SAMPLERS = {
    "ald": by_table(annealed_langevin(LADDER, 2e-5, 4)),
    "cas": by_table(consistent_annealed(LADDER)),
    "heun": by_table(few_step.heun(LADDER)),
    "dpmpp": by_table(few_step.dpm_solver_pp(LADDER)),
    "predictor_corrector": lambda score, x, samples: (
        predictor_corrector(score, x, LADDER, contract_noise(3, samples, SHAPE), norm="sample").x
    ),
    "flow": lambda score, x, samples: (
        probability_flow(score, x, 5.0, 0.02, rtol=1e-3, atol=1e-3, denoise=True, compact=False).x
    ),
    "adaptive": lambda score, x, samples: (
        adaptive(score, x, 0.02, 5.0, contract_noise(3, samples, SHAPE), compact=False, rtol=0.1).x
    ),
}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@each
def test_samples_of_every_sampler_measure_what_was_measured(operator, sampler):
    clean = (SMOOTH.mean + 0.5 * normals(3, D, seed=4)).reshape(3, *SHAPE).float()
    y, samples = operator.apply(clean), torch.tensor([4, 0, 9])
    x = 5 * contract_noise(3, samples, SHAPE)(Stream.INITIAL, 0)

    def sample(index):
        guide = Projected(operator, y).rows(index, x.device)
        return sampler(
            lambda x, sigma: guide.score(SMOOTH.score, x, sigma), x[index], samples[index]
        )

    found = sample(torch.arange(3))
    torch.testing.assert_close(operator.apply(found), y, rtol=0, atol=1e-5)
    loses = torch.linalg.matrix_rank(dense(operator)) < D
    assert ((found - clean).abs().max() > 0.05) == loses
    alone = sample(torch.tensor([2]))
    torch.testing.assert_close(alone, found[2:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("table", [vp_reverse_diffusion, vp_ancestral])
@each
def test_vp_tables_keep_measurements(operator, table):
    """Chains without noise end at the mean given y, as far as 300 steps go."""
    sde, n = VP(), 300
    y = operator.apply((ISOTROPIC.mean + 0.5 * normals(2, D, seed=4)).reshape(2, *SHAPE)).float()
    program = table(sde, n)
    scale = sde.mean_scale(np.linspace(1.0, 1e-3, n))

    def network(x, k):
        sigma = torch.full((2,), float(program.sigma[k]), dtype=torch.float64)
        guide = Shrunk(Projected(operator, y))
        found = guide.score(lambda x, s: ISOTROPIC.score(x, s, scale[k]), x, sigma)
        return (program.sigma[k] * found).float()

    found = run(program, network, still())
    for row, measured in zip(found, y.double(), strict=True):
        mean = ISOTROPIC.given(dense(operator), measured.flatten(), 0.0).mean
        torch.testing.assert_close(row.flatten().double(), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(operator.apply(found), y, rtol=0, atol=1e-3)


def test_vp_states_are_imposed_at_their_scale():
    sde, t = VP(), 0.3
    m, std = float(sde.mean_scale(t)), float(sde.std(t))
    grey, x, z = Grey(), normals(2, *SHAPE), normals(2, *SHAPE, seed=1)
    y = grey.apply(normals(2, *SHAPE, seed=2))
    found = Shrunk(Imposed(grey, y)).impose(x, std, z)
    torch.testing.assert_close(grey.apply(found), m * y + std * grey.apply(z))
    unseen = x - grey.correct(torch.zeros_like(x), grey.apply(x))
    torch.testing.assert_close(found - grey.correct(torch.zeros_like(x), grey.apply(found)), unseen)
    end = Shrunk(Imposed(grey, y)).impose(x, 0.0, None)
    torch.testing.assert_close(grey.apply(end), y)


@pytest.mark.parametrize("variant", ["ncsnv2", "ncsn"])
@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("build", [
    lambda: annealed_langevin(LADDER, 2e-5, 3), lambda: few_step.dpm_solver_pp(LADDER),
], ids=["ald", "dpmpp"])  # fmt: skip
def test_imposing_a_mask_is_the_fused_inpainting_bit_for_bit(build, variant, restore):
    program = inpainting(build(), variant, restore=restore)
    known, mask = exact.normals(2, *SHAPE, seed=2), exact.normals(2, *SHAPE, seed=3) > 0
    data, x = exact.Gaussian(), exact.normals(2, *SHAPE, seed=1)
    network = network_of(program, lambda x, sigma: data.score(x, sigma))
    keys = {"seed": 7, "samples": torch.tensor([5, 2])}
    update = ConstrainedUpdate(Imposed(Mask(mask), known))
    with ops.backend("reference"):
        fused = run(program, network, Chains(x=x.clone(), mask=mask, known=known, **keys))
        found = run(program, network, Chains(x=x.clone(), **keys), update=update)
        free = run(program, network, Chains(x=x.clone(), **keys))
    assert torch.equal(found, fused)
    assert torch.equal(found[mask], known[mask]) == restore
    assert not torch.equal(free, fused)


CENTRES, WEIGHTS, WIDTH = normals(4, D, seed=6), torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), 0.6


def class_logits(x, sigma):
    """log p(x, class): of the classes of a Gaussian mixture, at noise level sigma; (B, 4)."""
    distance = (x.flatten(1)[:, None] - CENTRES.to(x.dtype)).square().sum(2)
    return WEIGHTS.log().to(x.dtype) - distance / (2 * (WIDTH**2 + sigma**2))[:, None]


def mixture(x, sigma):
    """Its score: that of log sum_k exp(logits_k), the density but for a constant."""
    share = class_logits(x, sigma).softmax(1)
    towards = CENTRES[None] - x.flatten(1)[:, None]
    slope = (share[..., None] * towards).sum(1) / (WIDTH**2 + sigma**2)[:, None]
    return slope.reshape(x.shape)


def component(x, sigma, label, width=WIDTH):
    centre = CENTRES[label].reshape(-1, *SHAPE)
    return (centre - x) / per_sample(width**2 + sigma**2, x)


@pytest.mark.parametrize("inference", [True, False])
def test_an_exact_classifier_turns_the_mixture_into_its_class(inference):
    labels = torch.tensor([2, 0, 1])
    guide = Conditional(classifier_gradient(class_logits), labels)
    with torch.inference_mode(inference):
        x, sigma = 3 * normals(3, *SHAPE), torch.tensor([0.1, 1.0, 4.0]).double()
        found = guide.score(mixture, x, sigma)
        expected = component(x, sigma, labels)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
        part = guide.rows(torch.tensor([2, 1]), x.device)
        again = part.score(mixture, x[[2, 1]], sigma[[2, 1]])
        torch.testing.assert_close(again, expected[[2, 1]], rtol=1e-8, atol=1e-8)
        doubled = Conditional(guide.gradient, labels, 2.0).score(mixture, x, sigma)
        plain = mixture(x, sigma)
        torch.testing.assert_close(doubled - plain, 2 * (expected - plain), rtol=1e-8, atol=1e-8)


def test_guides_after_one_another():
    """A class and a measurement: the posterior of that component."""
    labels, operator, noise = torch.tensor([3, 3]), OPERATORS["grey"], 0.2
    y = operator.apply(normals(1, *SHAPE, seed=2)).expand(2, 1, 4, 4)
    guide = Both(
        Conditional(classifier_gradient(class_logits), labels),
        Projected(operator, y, noise, WIDTH),
    ).rows(torch.tensor([1, 0]), torch.device("cpu"))
    x, sigma = normals(2, *SHAPE), torch.full((2,), 0.8, dtype=torch.float64)
    data = Correlated(CENTRES[3], WIDTH**2 * torch.eye(D, dtype=torch.float64))
    expected = data.given(dense(operator), y[0].flatten(), noise).score(x, sigma)
    found = guide.score(mixture, x, sigma)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Projected(Grey(), torch.zeros(1, 1, 4, 4), -0.1), "noise must be at least 0"),
    (lambda: Projected(Grey(), torch.zeros(1, 1, 4, 4), math.nan), "noise must be at least 0"),
    (lambda: Conditional(lambda x, *_: x, torch.zeros(1), math.inf), "scale must be finite"),
    (
        lambda: classifier_gradient(lambda x, sigma: x.flatten(1).sum(1))(
            torch.zeros(2, *SHAPE), torch.ones(2), torch.zeros(2).long()
        ),
        r"must return logits \(2, K\); got \(2,\)",
    ),
])  # fmt: skip
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()

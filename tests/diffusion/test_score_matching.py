"""Explicit, implicit, denoising and sliced score matching: closed forms, and each other."""

import math

import pytest
import torch

from ncsn_fast.diffusion import objectives

# Data N(m, s^2 I) in D dimensions and the score -(x - a) / b^2.
D, M, S, A, B, SIGMA = 3, 0.3, 0.8, 0.1, 1.2, 0.5
N = 400_000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(n=N, seed=0):
    return M + S * torch.randn(n, D, generator=generator(seed), dtype=torch.float64)


def linear(a=A, b=B):
    return lambda x: -(x - a) / b**2


def explicit_form(a, b):
    return 0.5 * D * ((1 / S**2 - 1 / b**2) ** 2 * S**2 + (M - a) ** 2 / b**4)


def implicit_form(a, b):
    return D * (-1 / b**2 + 0.5 * (S**2 + (M - a) ** 2) / b**4)


def agrees(losses, expected, band=4.5):
    losses = losses.detach()
    error = losses.std() / math.sqrt(len(losses))
    return abs(float(losses.mean()) - expected) <= band * float(error) + 1e-12


def mlp(seed=0, width=3, outputs=None):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(width, 16), torch.nn.Softplus(), torch.nn.Linear(16, outputs or width)
    ).double()


def test_printed_numbers():
    assert explicit_form(A, B) == pytest.approx(0.75231481, abs=5e-9)
    assert implicit_form(A, B) == pytest.approx(-1.59143519, abs=5e-9)
    assert explicit_form(A, B) - implicit_form(A, B) == pytest.approx(D / (2 * S**2))
    assert pytest.approx(2.34375) == D / (2 * S**2)
    assert implicit_form(M, S) == pytest.approx(-D / (2 * S**2))  # the minimum


@pytest.mark.parametrize(("a", "b"), [(A, B), (M, S), (-0.4, 0.7)])
def test_gaussian_closed_forms(a, b):
    x = gaussian()
    assert agrees(objectives.explicit(linear(a, b), x, linear(M, S)(x)), explicit_form(a, b))
    assert agrees(objectives.implicit(linear(a, b), x), implicit_form(a, b))


@pytest.mark.parametrize("variance_reduced", [False, True])
@pytest.mark.parametrize("slices", ["gaussian", "rademacher", "sphere"])
def test_sliced_is_the_implicit_loss_on_average(slices, variance_reduced):
    losses = objectives.sliced(
        linear(), gaussian(), slices=slices, variance_reduced=variance_reduced,
        generator=generator(1),
    )  # fmt: skip
    assert agrees(losses, implicit_form(A, B))


@pytest.mark.parametrize(
    ("slices", "variance_reduced", "printed", "digits"),
    [
        ("gaussian", False, 2.49, 0.03),
        ("gaussian", True, 3.05, 0.03),
        ("rademacher", False, 0.4834, 0.005),
        ("rademacher", True, 0.161, 0.002),
    ],
)
def test_variance_of_one_slice(slices, variance_reduced, printed, digits):
    """Reduced variance is not always lower: Gaussian slices show the contrary here."""
    losses = objectives.sliced(
        linear(), gaussian(), slices=slices, variance_reduced=variance_reduced,
        generator=generator(2),
    )  # fmt: skip
    assert float(losses.detach().var()) == pytest.approx(printed, abs=digits)
    if variance_reduced:  # 2 D / b^4 for Gaussian slices, 0 for signs; and that of 1/2 ||s||^2
        probe = 2 * D / B**4 if slices == "gaussian" else 0.0
        norm = 0.25 * (2 * D * S**4 + 4 * D * S**2 * (M - A) ** 2) / B**8
        assert probe + norm == pytest.approx(printed, abs=0.005)
    elif slices == "rademacher":  # of 1/2 p^2, where p is N(mu sum v, D tau^2) for given signs
        mu2, tau2 = (M - A) ** 2 / B**4, S**2 / B**4
        second = D * (mu2 + tau2)
        fourth = mu2**2 * (3 * D**2 - 2 * D) + 6 * mu2 * tau2 * D**2 + 3 * D**2 * tau2**2
        assert 0.25 * (fourth - second**2) == pytest.approx(printed, abs=5e-5)


@pytest.mark.parametrize("slices", ["gaussian", "rademacher"])
def test_variance_of_the_trace(slices):
    """2 ||sym A||^2 for Gaussian slices, 2 (||sym A||^2 - sum a_ii^2) for signs."""
    a = torch.tensor([[1.0, 2.0, -0.5], [0.3, -1.5, 0.7], [1.1, 0.2, 0.4]], dtype=torch.float64)
    x = torch.zeros(N, 3, dtype=torch.float64)
    losses = objectives.sliced(
        lambda x: x @ a.T, x, slices=slices, variance_reduced=True, generator=generator(3)
    )
    symmetric = (a + a.T) / 2
    expected = 2 * symmetric.square().sum()
    if slices == "rademacher":
        expected -= 2 * a.diagonal().square().sum()
    assert agrees(losses, float(a.trace()))
    assert float(losses.detach().var()) == pytest.approx(float(expected), rel=0.02)


def test_denoising_is_implicit_on_the_smoothed_data_and_a_constant():
    x, z = gaussian(), gaussian(seed=4).sub_(M).div_(S)
    losses = objectives.denoising(linear(), x, SIGMA, z)
    assert losses.dtype == torch.float64
    assert agrees(losses, 4.58940972)
    implicit = objectives.implicit(linear(), x + SIGMA * z)
    difference = losses - implicit
    assert agrees(difference, D / (2 * SIGMA**2))
    best = objectives.denoising(linear(M, math.hypot(S, SIGMA)), x, SIGMA, z)
    assert agrees(best, 4.31460674)
    assert agrees(SIGMA**2 * best, 1.07865169)
    assert float(best.mean()) < float(losses.mean())


def test_levels_take_any_shape():
    x, z = torch.randn(2, 5, 2, generator=generator()).unbind()
    sigmas, level = torch.tensor([2.0, 0.5]), torch.tensor([0, 1, 1, 0, 1])
    losses = objectives.denoising_score_matching(lambda y, k: -y, x, sigmas, level, z)
    for i in range(5):
        sigma = float(sigmas[level[i]])
        expected = sigma**2 * objectives.denoising(torch.neg, x[i : i + 1], sigma, z[i : i + 1])
        torch.testing.assert_close(losses[i : i + 1], expected)


def test_implicit_trace_of_a_network_is_that_of_its_jacobian():
    net, x = mlp(), gaussian(7)
    jacobians = torch.func.vmap(torch.func.jacrev(net))(x)
    trace = jacobians.diagonal(dim1=1, dim2=2).sum(1)
    expected = trace + 0.5 * net(x).square().sum(1)
    torch.testing.assert_close(objectives.implicit(net, x), expected)
    # Slices of an exact quadrature: the three axes, sqrt(3) long, average to the trace.
    many = objectives.sliced(net, x[:1].expand(20_000, 3), n_slices=5, generator=generator())
    assert agrees(many, float(expected[0].detach()))


@pytest.mark.parametrize("loss", ["explicit", "implicit", "denoising", "sliced"])
def test_gradients_of_an_energy_network(loss):
    """Losses of score_of(E), differentiated with respect to the weights: finite differences."""
    net, x = mlp(outputs=1), gaussian(6)
    score = objectives.score_of(lambda y: net(y).squeeze(1))
    calls = {
        "explicit": lambda: objectives.explicit(score, x, linear(M, S)(x)),
        "implicit": lambda: objectives.implicit(score, x),
        "denoising": lambda: objectives.denoising(score, x, SIGMA, gaussian(6, 1)),
        "sliced": lambda: objectives.sliced(score, x, n_slices=2, generator=generator(5)),
    }
    weight = net[0].weight
    (gradient,) = torch.autograd.grad(calls[loss]().mean(), weight)
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight[2, 1] += step
            values.append(float(calls[loss]().mean()))
            weight[2, 1] -= step
    assert float(gradient[2, 1]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def test_without_gradients_nothing_is_kept():
    net, x = mlp(), gaussian(4)
    with torch.no_grad():
        for loss in (
            objectives.implicit(net, x),
            objectives.sliced(net, x, variance_reduced=True),
            objectives.score_of(lambda y: net(y).sum(1))(x),
        ):
            assert not loss.requires_grad
    assert not x.requires_grad


def test_scores_that_are_constant():
    constant = torch.tensor([2.0, -1.0])
    x = torch.randn(4, 2, generator=generator())
    for score in (
        lambda y: constant.expand(len(y), 2),
        objectives.score_of(lambda y: -(y @ constant)),
        objectives.score_of(lambda y: torch.zeros(len(y), requires_grad=True)),
    ):
        expected = 0.5 * score(x).square().sum(1)
        torch.testing.assert_close(objectives.implicit(score, x), expected)
        reduced = objectives.sliced(score, x, variance_reduced=True, generator=generator())
        torch.testing.assert_close(reduced, expected)


def test_images_and_empty_batches():
    x = torch.randn(3, 2, 4, 3, generator=generator())
    conv = torch.nn.Conv2d(2, 2, 3, padding=1)
    for loss in (
        objectives.implicit(conv, x),
        objectives.sliced(conv, x),
        objectives.explicit(conv, x, -x),
    ):
        assert loss.shape == (3,)
    assert objectives.implicit(conv, x[:0]).shape == (0,)
    trace = 12 * sum(float(conv.weight.detach()[c, c, 1, 1]) for c in range(2))  # the middle tap
    expected = trace + 0.5 * conv(x).square().flatten(1).sum(1)
    torch.testing.assert_close(objectives.implicit(conv, x), expected)


@pytest.mark.parametrize("slices", ["gaussian", "rademacher", "sphere"])
def test_slices(slices):
    like = torch.zeros(50_000, 2, 2, dtype=torch.float64)
    v = objectives.random_slices(slices, like, generator())
    assert torch.equal(v, objectives.random_slices(slices, like, generator()))
    assert (v.shape, v.dtype) == (like.shape, like.dtype)
    flat = v.flatten(1)
    torch.testing.assert_close(
        flat.T @ flat / len(v), torch.eye(4, dtype=torch.float64), atol=0.03, rtol=0
    )
    if slices != "gaussian":
        norms = flat.square().sum(1)
        torch.testing.assert_close(norms, torch.full_like(norms, 4.0))


def test_bad_arguments():
    x = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="n_slices must be at least 1; got 0"):
        objectives.sliced(torch.neg, x, n_slices=0)
    with pytest.raises(ValueError, match="'rademacher' or 'sphere'; got 'cube'"):
        objectives.sliced(torch.neg, x, slices="cube")

"""Measurements: operators beside their dense matrices, and the solves built on them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from ncsn_fast.samplers.operators import (
    Grey,
    Linear,
    Mask,
    Operator,
    Separable,
    block_mean,
    conjugate_gradients,
    gaussian_blur,
)
from ncsn_fast.samplers.procedure import SolverError

SHAPE = (3, 6, 4)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel(*size):
    """An uneven kernel, its largest entry off the middle."""
    return torch.exp(normals(*size, seed=5)) / 10


def convolution(x):
    k = kernel(3, 3).to(x).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(x, k, groups=x.shape[1])


class Shift(Operator):
    """A user's own: two operators of the base class, nothing else."""

    def apply(self, x):
        return 2 * x.roll(1, dims=3)

    def adjoint(self, y):
        return 2 * y.roll(-1, dims=3)


OPERATORS = {
    "mask": Mask(normals(2, *SHAPE, seed=1) > 0),
    "one mask for all": Mask(normals(1, *SHAPE, seed=1) > 0),
    "grey": Grey(),
    "luma": Grey((0.299, 0.587, 0.114)),
    "block mean": block_mean(2, 6, 4),
    "blur": gaussian_blur(0.6, 6, 4),
    "separable": Separable(normals(5, 6, seed=2), normals(4, 4, seed=3)),
    "taller": Separable(normals(8, 6, seed=2), normals(3, 4, seed=3)),
    "linear": Linear(convolution, SHAPE),
    "linear with its adjoint": Linear(
        lambda x: x.flip(3)[:, :, ::2], SHAPE,
        lambda y: torch.stack((y, torch.zeros_like(y)), dim=3).flatten(2, 3).flip(3),
    ),
    "own": Shift(),
}  # fmt: skip
each = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def dense(operator):
    """A of both samples as matrices (2, M, D), by its columns."""
    d = int(np.prod(SHAPE))
    eye = torch.eye(d, dtype=torch.float64).reshape(d, 1, *SHAPE).expand(d, 2, *SHAPE)
    return torch.stack([operator.apply(e).flatten(1) for e in eye], dim=2)


@each
def test_the_adjoint_is_the_transpose(operator):
    a, x = dense(operator), normals(2, *SHAPE, seed=4)
    measured = operator.apply(x)
    torch.testing.assert_close((a @ x.flatten(1)[..., None])[..., 0], measured.flatten(1))
    y = normals(*measured.shape, seed=6)
    expected = (a.mT @ y.flatten(1)[..., None])[..., 0].reshape(x.shape)
    torch.testing.assert_close(operator.adjoint(y), expected)


@each
@pytest.mark.parametrize("damping", [0.0, 0.3, torch.tensor([0.2, 2.0])], ids=["0", "1", "each"])
def test_solves_are_those_of_the_matrix(operator, damping):
    a = dense(operator)
    gram = a @ a.mT
    r = operator.apply(normals(2, *SHAPE, seed=7))  # in the range: the pseudo-inverse is meant
    each_damping = torch.as_tensor(damping, dtype=torch.float64).expand(2)[:, None, None]
    damped = gram + each_damping * torch.eye(gram.shape[1], dtype=torch.float64)
    expected = (torch.linalg.pinv(damped, rtol=1e-10) @ r.flatten(1)[..., None])[..., 0]
    found = operator.solve(r, damping).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@each
def test_corrected_images_are_the_nearest_that_fit(operator):
    x, y = normals(2, *SHAPE, seed=8), operator.apply(normals(2, *SHAPE, seed=9))
    found = operator.correct(x, y)
    torch.testing.assert_close(operator.apply(found), y, rtol=0, atol=1e-4)
    moved = (found - x).flatten(1)
    a = dense(operator)
    expected = torch.linalg.pinv(a, rtol=1e-10) @ (y - operator.apply(x)).flatten(1)[..., None]
    torch.testing.assert_close(moved, expected[..., 0], rtol=1e-3, atol=1e-3)
    half = operator.correct(x, y, 1e9)
    torch.testing.assert_close(half, x, rtol=0, atol=1e-6)


@each
def test_rows_are_those_of_their_samples(operator):
    x = normals(2, *SHAPE, seed=8)
    index = torch.tensor([1, 0, 1])
    part = operator.rows(index, torch.device("cpu"))
    torch.testing.assert_close(part.apply(x[index]), operator.apply(x)[index], rtol=0, atol=0)


def test_known_pixels_are_measured_to_the_bit():
    mask = OPERATORS["mask"]
    x, y = normals(2, *SHAPE).float() * 50, normals(2, *SHAPE, seed=1).float()
    found = mask.correct(x, y)
    assert torch.equal(found[mask.known], y[mask.known])
    assert torch.equal(found[~mask.known], x[~mask.known])


def test_block_means_and_blur_are_the_librarys():
    x = normals(2, *SHAPE)
    torch.testing.assert_close(OPERATORS["block mean"].apply(x), F.avg_pool2d(x, 2))
    for boundary in ("reflect", "nearest", "constant", "wrap"):
        found = gaussian_blur(1.3, 6, 4, boundary).apply(x)
        expected = gaussian_filter(x.numpy(), (0, 0, 1.3, 1.3), mode=boundary)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_block_means_hold_a_multiple_of_the_identity():
    y = normals(2, 3, 3, 2)
    operator = OPERATORS["block mean"]
    torch.testing.assert_close(operator.apply(operator.adjoint(y)), y / 4)


def test_what_a_blur_hides_is_left_alone():
    """Of a strong blur most frequencies are lost in rounding; they are neither made up nor big."""
    operator = gaussian_blur(2.0, 16, 16)
    image = normals(1, 1, 16, 16, seed=3).float()
    found = operator.correct(torch.zeros_like(image), operator.apply(image))
    assert found.abs().max() < 2 * image.abs().max()
    torch.testing.assert_close(operator.apply(found), operator.apply(image), rtol=0, atol=2e-4)
    sharp = Separable(operator.height, operator.width, cutoff=0.1)
    kept = sharp.correct(image, torch.zeros_like(image))
    assert kept.square().sum() > 0.5 * image.square().sum()


COLOURS = torch.tensor([
    [0.57735014, -0.81649649, 4.7008325e-08],
    [0.57735026, 0.40824834, 0.7071067],
    [0.57735026, 0.40824822, -0.7071068],
])  # fmt: skip


def decouple(x):
    return torch.einsum("bchw,cd->bdhw", x, COLOURS.to(x))


def couple(x):
    return torch.einsum("bdhw,cd->bchw", x, COLOURS.to(x))


def test_grey_is_the_published_colourisation():
    """The orthonormal basis of the published code: only its first coordinate is constrained."""
    x, reference = normals(2, *SHAPE), normals(2, *SHAPE, seed=1)
    torch.testing.assert_close(couple(decouple(x)), x, rtol=0, atol=1e-6)
    for weights, scale in (
        ((1 / 3,) * 3, 3**-0.5),
        ((3**-0.5,) * 3, 1.0),
        ((-2.0,) * 3, -(12**0.5)),
    ):
        grey = Grey(weights)
        measured = grey.apply(reference)
        torch.testing.assert_close(
            measured, scale * decouple(reference)[:, :1], rtol=1e-6, atol=1e-6
        )
        expected = decouple(x)
        expected[:, :1] = decouple(reference)[:, :1]
        found = grey.correct(x, measured)
        torch.testing.assert_close(found, couple(expected), rtol=0, atol=1e-6)


def test_conjugate_gradients_stop_sample_by_sample():
    matrix = torch.stack([torch.eye(4), torch.diag(torch.tensor([1.0, 2.0, 5.0, 9.0]))])
    calls = []

    def product(u):
        calls.append(len(u))
        return (matrix @ u[..., None])[..., 0]

    r = torch.tensor(
        [
            [1.0, 2, 3, 4],
            [1.0, 2, 3, 4],
        ]
    )
    found = conjugate_gradients(product, r)
    torch.testing.assert_close(product(found), r, rtol=1e-5, atol=1e-5)
    assert len(calls) == 5  # four different eigenvalues, and the check above
    assert torch.equal(conjugate_gradients(product, torch.zeros(2, 4)), torch.zeros(2, 4))


def test_an_operator_that_loses_what_it_measures_asks_for_noise():
    hilbert = 1 / (torch.arange(24)[:, None] + torch.arange(24) + 1.0)
    operator = Linear(lambda x: x @ hilbert.to(x), (1, 1, 24))
    r = normals(1, 1, 1, 24)
    with pytest.raises(SolverError, match=r"noise > 0"):
        operator.solve(r)
    found = operator.solve(r, 1e-2)
    left = operator.apply(operator.adjoint(found)) + 1e-2 * found - r
    assert left.norm() <= 1e-5 * r.norm()


def test_adjoints_by_autograd_in_inference_mode():
    y = normals(2, 3, 4, 2)
    expected = OPERATORS["linear"].adjoint(y)
    with torch.inference_mode():
        found = OPERATORS["linear"].adjoint(y.clone())
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: block_mean(3, 6, 4), "factor must divide 6 and 4; got 3"),
    (lambda: block_mean(0, 6, 4), "factor must divide"),
    (lambda: gaussian_blur(0.0, 6, 4), "positive and finite; got 0.0"),
    (lambda: gaussian_blur(1.0, 6, 4, "mirror"), "boundary must be one of reflect"),
    (lambda: Grey((0.0, 0.0)), "weights must not all be 0"),
    (lambda: Grey().apply(torch.zeros(2, 1, 4, 4)), "weights for 3 channels and the images have 1"),
    (lambda: Linear(lambda x: x + 1, SHAPE), "does not map 0 to 0"),
])  # fmt: skip
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""What runs between two convolutions, in Triton, against the float64 specification."""

import pytest
import torch
from ncsn_fast.kernels.add_elu import add, add_bias, add_elu, elu, pointwise
from ncsn_fast.kernels.mean_pool2 import mean_pool2
from ncsn_fast.kernels.pool5 import avg_pool5, max_pool5
from ncsn_fast.kernels.resize_add import resize_add
from torch import Tensor
from triton_common import DEVICE, FLOATS, assert_close, nhwc, noise_like

from ncsn_fast.ops import reference
from ncsn_fast.ops.activations import ACTIVATIONS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy: masked lanes overflow

SIZES = ((1, 1), (2, 3), (9, 4))
INPUTS = {
    "offset": lambda: noise_like(2, 16, 6, 10) * 1.7 - 2.3,
    "far below zero": lambda: noise_like(1, 5, 4, 4) - 40.0,
    "near zero": lambda: noise_like(2, 16, 4, 4) * 1e-4,
    "amplitude 512": lambda: 512.0 * noise_like(1, 6, 6, 6).sign() + noise_like(1, 6, 1, 1),
    "prime sizes": lambda: noise_like(2, 37, 7, 11) - 2.3,
    "several tiles": lambda: noise_like(1, 70, 9, 19) - 2.3,
    "one column": lambda: noise_like(1, 33, 7, 1) - 2.3,
    "one row": lambda: noise_like(1, 3, 1, 9) - 2.3,
    "one element": lambda: noise_like(1, 1, 1, 1) - 2.3,
    "no samples": lambda: noise_like(0, 16, 4, 4),
}


def other(x: Tensor) -> Tensor:
    """A second operand: of the size of x, and not cancelling it."""
    return nhwc((noise_like(*x.shape, seed=5) * 1.3 + 0.4).to(x.dtype))


def even(x: Tensor) -> Tensor:
    return nhwc(x.repeat(1, 1, 1 + x.shape[2] % 2, 1 + x.shape[3] % 2))


def sized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return other(torch.empty(*x.shape[:2], *size, dtype=x.dtype))


# Each op: what it is called with, its kernel, its reference.
OPS = {
    "elu": (lambda x: [(x,)], elu, reference.elu),
    "add": (lambda x: [(x, other(x))], add, lambda a, b: reference.add_elu(a, b)[0]),
    "add_elu": (lambda x: [(x, other(x))], add_elu, reference.add_elu),
    "max_pool5": (lambda x: [(x,)], max_pool5, reference.max_pool5),
    "avg_pool5": (lambda x: [(x,)], avg_pool5, reference.avg_pool5),
    "mean_pool2": (
        lambda x: [(even(x),), (even(x), other(even(x)))], mean_pool2, reference.mean_pool2,
    ),
    "resize_add": (
        lambda x: [(x, s) for s in SIZES] + [(x, s, sized(x, s)) for s in SIZES],
        resize_add, reference.resize_add,
    ),
}  # fmt: skip


def bias_of(x: Tensor) -> Tensor:
    return (noise_like(x.shape[1], seed=7) * 2 + 0.7).to(DEVICE)


def plus(x: Tensor, bias: Tensor) -> Tensor:
    """x + bias in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) + bias[:, None, None]


# The biased ones: kernel and specification of maps and a bias.
BIASED = {
    "add_bias": (1, add_bias, lambda a, bias: plus(a, bias).to(a.dtype)),
    "elu": (
        1, lambda a, bias: elu(a, bias=bias),
        lambda a, bias: reference.elu(plus(a, bias)).to(a.dtype),
    ),
    "add": (
        2, lambda a, b, bias: add(a, b, bias=bias),
        lambda a, b, bias: (plus(a, bias) + b).to(a.dtype),
    ),
    "add_elu": (
        2, lambda a, b, bias: add_elu(a, b, bias=bias),
        lambda a, b, bias: tuple(
            y.to(a.dtype) for y in reference.add_elu(plus(a, bias), plus(b, 0 * bias))
        ),
    ),
}  # fmt: skip


def doubled(arguments: tuple) -> list:
    return [a.cpu().double() if isinstance(a, Tensor) else a for a in arguments]


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


CASES = [(name, torch.float32) for name in INPUTS]
CASES += [(name, t) for name in ("near zero", "prime sizes") for t in FLOATS[1:]]


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("op", OPS)
def test_within_twice_eager(op, name, dtype):
    calls, kernel, specification = OPS[op]
    for arguments in calls(nhwc(INPUTS[name]().to(dtype))):
        exact = outputs(specification(*doubled(arguments)))
        eager = outputs(specification(*arguments))
        for mine, theirs, truth in zip(outputs(kernel(*arguments)), eager, exact, strict=True):
            assert_close(mine, theirs, truth)
            assert mine.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("prime sizes", dtype) for dtype in FLOATS]
    + [(name, torch.float32) for name in ("offset", "several tiles", "one column", "no samples")],
)
@pytest.mark.parametrize("op", BIASED)
def test_bias(op, name, dtype):
    """Channels that are a power of two, that are not, and that a block holds a part of."""
    maps, kernel, specification = BIASED[op]
    x = nhwc(INPUTS[name]().to(dtype))
    arguments = (*(x, other(x))[:maps], bias_of(x))
    exact = outputs(specification(*doubled(arguments)))
    eager = outputs(specification(*arguments))
    for mine, theirs, truth in zip(outputs(kernel(*arguments)), eager, exact, strict=True):
        assert_close(mine, theirs, truth)
        assert mine.is_contiguous(memory_format=torch.channels_last)


def test_bias_of_more_channels_than_a_block():
    x, bias = nhwc(noise_like(1, 2500, 1, 3)), noise_like(2500, seed=1).to(DEVICE)
    assert torch.equal(add_bias(x, bias), x + bias[:, None, None])
    in_place = x.clone()
    assert torch.equal(elu(in_place, bias=bias, out=in_place), elu(add_bias(x, bias)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_weights_and_other_activations(activation):
    a, b = nhwc(noise_like(2, 12, 5, 3)), nhwc(noise_like(2, 12, 5, 3, seed=5))
    bias, weights = bias_of(a), (0.7, -1.25, 0.5)
    exact = sum(w * x.cpu().double() for w, x in zip(weights, (a, b, a), strict=True))
    exact = exact + bias.cpu().double()[:, None, None]
    total, y = torch.empty_like(a), torch.empty_like(a)
    pointwise([a, b, a], bias, total, y, activation, weights)
    torch.testing.assert_close(total.cpu(), exact.float(), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(
        y.cpu(), reference.activation(exact, activation).float(), rtol=1e-5, atol=3e-6
    )
    pointwise([a, b], None, total, None)
    pointwise([a, b], None, y, None, "silu", (1.0, 1.0))
    assert torch.equal(total, y)


@pytest.mark.parametrize("op", OPS)
def test_independent_of_batch_and_place(op):
    calls, kernel, _ = OPS[op]
    x = nhwc(noise_like(3, 12, 6, 10) - 2.3)
    for arguments in calls(x):
        whole = outputs(kernel(*arguments))
        alone = outputs(kernel(*(a[2:] if isinstance(a, Tensor) else a for a in arguments)))
        assert all(torch.equal(a[2:], b) for a, b in zip(whole, alone, strict=True))


def test_pools_of_infinities_and_nans():
    x = nhwc(noise_like(1, 8, 9, 9))
    x[0, 1, 4, 4], x[0, 2, 4, 4], x[0, 3] = torch.nan, torch.inf, -torch.inf
    assert torch.equal(max_pool5(x).nan_to_num(nan=7.0), reference.max_pool5(x).nan_to_num(nan=7.0))
    torch.testing.assert_close(avg_pool5(x), reference.avg_pool5(x), equal_nan=True)


def test_resizing_to_the_same_size_and_at_pixels_is_exact():
    x = nhwc(noise_like(1, 5, 4, 5))
    assert torch.equal(resize_add(x, (4, 5)), x)
    assert torch.equal(resize_add(x, (7, 9))[:, :, ::2, ::2], x)


def test_in_place_and_into_buffers():
    a = nhwc(noise_like(2, 8, 4, 4) - 1)
    b = other(a)
    total, y = add_elu(a, b)
    for into in ({"total": a.clone(), "out": b.clone()}, {"out": a.clone(), "total": b.clone()}):
        mine = add_elu(a, b, **into)
        assert mine[0] is into["total"]
        assert mine[1] is into["out"]
        assert torch.equal(mine[0], total)
        assert torch.equal(mine[1], y)
    in_place = a.clone()
    assert torch.equal(add(in_place, b, out=in_place), total)
    in_place = a.clone()
    assert torch.equal(elu(in_place, out=in_place), elu(a))
    resized = resize_add(a, (6, 6), sized(a, (6, 6)))
    assert torch.equal(resize_add(a, (6, 6), out := sized(a, (6, 6)), out=out), resized)


@pytest.mark.parametrize("op", ["max_pool5", "mean_pool2", "resize_add", "add_elu"])
def test_refusals(op):
    calls, kernel, _ = OPS[op]
    x = torch.zeros(2, 4, 6, 6, device=DEVICE)
    (arguments, *_) = calls(nhwc(x))
    with pytest.raises(TypeError, match="float16"):
        kernel(*(a.double() if isinstance(a, Tensor) else a for a in arguments))
    sliced = [nhwc(x)[:, :, :, ::2]] * (2 if op == "add_elu" else 1)
    with pytest.raises(ValueError, match="channels-last"):
        kernel(*sliced, *arguments[len(sliced) :])


def test_more_refusals():
    x = nhwc(torch.zeros(2, 4, 5, 6))
    with pytest.raises(ValueError, match="even height and width"):
        mean_pool2(x)
    with pytest.raises(ValueError, match="another map than x"):
        max_pool5(x, out=x)
    with pytest.raises(ValueError, match="one shape"):
        add(x, x[:1])
    with pytest.raises(ValueError, match=r"bias must be float32, contiguous, of shape \(4,\)"):
        add_bias(x, bias_of(x)[:3])
    with pytest.raises(ValueError, match="channels-last"):
        elu(x.contiguous(), bias=bias_of(x))
    with pytest.raises(ValueError, match="one of none, elu"):
        pointwise([x], None, x, None, "mish")
    with pytest.raises(ValueError, match="those of 1 maps; got 2"):
        pointwise([x], None, x, None, "elu", (1.0, 2.0))

"""The CPU engine's kernels between two convolutions against their float64 specification."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ncsn_fast import _C, ops
from ncsn_fast.ops import cpu, reference

LEVELS = _C.isa_levels()
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}


def noise_like(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nhwc(x: Tensor) -> Tensor:
    """A copy in channels-last, with those strides even where others would do."""
    n, c, height, width = x.shape
    return torch.empty(n, height, width, c, dtype=x.dtype).permute(0, 3, 1, 2).copy_(x)


def empty_nhwc(x: Tensor, height: int, width: int) -> Tensor:
    return torch.full((*x.shape[:2], height, width), torch.nan, dtype=x.dtype).contiguous(
        memory_format=torch.channels_last
    )


def checkerboard(n: int, c: int, height: int, width: int) -> Tensor:
    sign = 1 - 2 * ((torch.arange(height)[:, None] + torch.arange(width)) % 2)
    return 512.0 * sign.expand(n, c, height, width) + noise_like(n, c, 1, 1)


INPUTS = {
    "offset": lambda: noise_like(3, 16, 16, 16) * 1.7 - 2.3,
    "far below zero": lambda: noise_like(2, 5, 8, 8) - 40.0,
    "near zero": lambda: noise_like(2, 16, 6, 6) * 1e-4,
    "amplitude 512": lambda: checkerboard(2, 6, 16, 16),
    "prime sizes": lambda: noise_like(3, 37, 7, 11) - 2.3,
    "several tiles": lambda: noise_like(1, 70, 67, 71) - 2.3,
    "one channel": lambda: noise_like(2, 1, 9, 5) - 2.3,
    "three channels": lambda: noise_like(2, 3, 32, 34) - 2.3,
    "one row": lambda: noise_like(2, 19, 1, 40) - 2.3,
    "one column": lambda: noise_like(2, 33, 40, 1) - 2.3,
    "one pixel": lambda: noise_like(3, 19, 1, 1) - 2.3,
    "one element": lambda: noise_like(1, 1, 1, 1) - 2.3,
    "no samples": lambda: noise_like(0, 16, 4, 4),
}


def other(x: Tensor) -> Tensor:
    """A second operand: of the size of x, and not cancelling it."""
    return nhwc((noise_like(*x.shape, seed=5) * 1.3 + 0.4).to(x.dtype))


def even(x: Tensor) -> Tensor:
    """x, repeated to an even height and width."""
    repeated = x.repeat(1, 1, 1 + x.shape[2] % 2, 1 + x.shape[3] % 2)
    return nhwc(repeated)


def run_elu(x: Tensor) -> list[Tensor]:
    return [cpu.elu_out(x, torch.empty_like(x))]


def run_add_elu(x: Tensor) -> list[Tensor]:
    total, out = torch.empty_like(x), torch.empty_like(x)
    cpu.add_elu_out(x, other(x), total=total, out=out)
    return [total, out]


def run_mean_pool2(x: Tensor) -> list[Tensor]:
    x = even(x)
    out = [empty_nhwc(x, x.shape[2] // 2, x.shape[3] // 2) for _ in range(2)]
    cpu.mean_pool2_out(x, out[0])
    cpu.mean_pool2_out(x, out[1], b=other(x))
    return out


SIZES = ((1, 1), (2, 3), (13, 7), (32, 32), (33, 65))


def run_resize(x: Tensor) -> list[Tensor]:
    return [cpu.resize_add_out(x, empty_nhwc(x, *size)) for size in SIZES]


def run_resize_add(x: Tensor) -> list[Tensor]:
    outputs = [empty_nhwc(x, *size) for size in SIZES]
    return [cpu.resize_add_out(x, out, a=other(out)) for out in outputs]


def resize_add(x: Tensor, computed: torch.dtype) -> list[Tensor]:
    operands = [other(empty_nhwc(x, *size)).to(computed) for size in SIZES]
    return [
        reference.resize_add(x.to(computed), size, a)
        for size, a in zip(SIZES, operands, strict=True)
    ]


def mean_pool2(x: Tensor, computed: torch.dtype) -> list[Tensor]:
    x = even(x)
    a, b = x.to(computed), other(x).to(computed)
    return [reference.mean_pool2(a), reference.mean_pool2(a, b)]


WEIGHTS = (0.7, -1.3)


def run_add_activation(x: Tensor) -> list[Tensor]:
    outputs = [torch.empty_like(x) for _ in range(3)]
    cpu.add_activation_out(
        x, other(x), total=outputs[0], out=outputs[1], activation="silu", weights=WEIGHTS
    )
    cpu.add_activation_out(x, other(x), out=outputs[2], activation="gelu")
    return outputs


def add_activation(x: Tensor, computed: torch.dtype) -> list[Tensor]:
    a, b = x.to(computed), other(x).to(computed)
    weighted = reference.add_activation(a, b, "silu", WEIGHTS)
    return [*weighted, reference.add_activation(a, b, "gelu")[1]]


def rows_of(x: Tensor) -> tuple[Tensor, Tensor]:
    return noise_like(*x.shape[:2], seed=6) + 1, noise_like(*x.shape[:2], seed=7)


def run_scale_shift(x: Tensor) -> list[Tensor]:
    scale, shift = rows_of(x)
    outputs = [torch.empty_like(x) for _ in range(3)]
    cpu.scale_shift_out(x, scale, shift, outputs[0], activation="silu")
    cpu.scale_shift_out(x, scale, None, outputs[1])
    cpu.scale_shift_out(x, None, shift, outputs[2])
    return outputs


def scale_shift(x: Tensor, computed: torch.dtype) -> list[Tensor]:
    scale, shift = rows_of(x)
    x = x.to(computed)
    return [
        reference.scale_shift(x, scale, shift, "silu"),
        reference.scale_shift(x, scale, None),
        reference.scale_shift(x, None, shift),
    ]


FACTORS = ((2, 2), (1, 3), (4, 1))


def run_upsample(x: Tensor) -> list[Tensor]:
    height, width = x.shape[2:]
    return [
        cpu.upsample_nearest_out(x, empty_nhwc(x, height * rows, width * columns))
        for rows, columns in FACTORS
    ]


# Taps, stride and padding of transposed convolutions.
TRANSPOSED = ((4, 2, 1), (3, 1, 0), (2, 3, 1), (5, 2, 0))


def transposed_cases(x: Tensor) -> Iterator[tuple[Tensor, Tensor | None, tuple[int, int], Any]]:
    """Weights, biases, sizes and settings of transposed convolutions of x."""
    c = x.shape[1]
    for taps, stride, padding in TRANSPOSED:
        weight, bias = noise_like(taps, taps, c, seed=8), noise_like(c, seed=9)
        height, width = (max(0, (n - 1) * stride + taps - 2 * padding) for n in x.shape[2:])
        for shift in (bias, None):
            yield weight, shift, (height, width), {"stride": stride, "padding": padding}


def run_depthwise_transposed(x: Tensor) -> list[Tensor]:
    return [
        cpu.depthwise_transposed_out(x, weight, bias, empty_nhwc(x, *size), **settings)
        for weight, bias, size, settings in transposed_cases(x)
    ]


def depthwise_transposed(x: Tensor, computed: torch.dtype) -> list[Tensor]:
    return [
        reference.depthwise_transposed(x.to(computed), weight, bias, **settings)
        if x.numel() and 0 not in size
        else torch.empty(*x.shape[:2], *size, dtype=computed)
        for weight, bias, size, settings in transposed_cases(x)
    ]


def square_cases(x: Tensor) -> Iterator[tuple[Tensor, int, int, tuple[int, int]]]:
    """Maps of more channels, factors, first pixels and sizes."""
    for factor, first, less in ((1, 0, 0), (2, 0, 0), (2, 1, 1), (3, 2, 1)):
        channels = noise_like(x.shape[1] * factor**2, 1, 1).to(x)
        height, width = (max(factor * n - first - less, 0) for n in x.shape[2:])
        yield nhwc(x.repeat(1, factor**2, 1, 1) + channels), factor, first, (height, width)


def run_depth_to_space(x: Tensor) -> list[Tensor]:
    return [
        cpu.depth_to_space_out(z, empty_nhwc(x, *size), factor, first=first)
        for z, factor, first, size in square_cases(x)
    ]


def depth_to_space(x: Tensor, computed: torch.dtype) -> list[Tensor]:
    return [
        reference.depth_to_space(z, factor, size=size, first=first).to(computed)
        for z, factor, first, size in square_cases(x)
    ]


def scores_of(x: Tensor) -> Tensor:
    """Rows of scores, one for each row of pixels and channel of x, of moderate size."""
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=1.0)
    return (x / largest * 4).to(x.dtype).contiguous()


def run_softmax(x: Tensor) -> list[Tensor]:
    return [cpu.softmax_in_place(scores_of(x)), cpu.softmax_in_place(scores_of(x), 0.25)]


def softmax(x: Tensor, computed: torch.dtype) -> list[Tensor]:
    scores = scores_of(x).to(computed)
    return [reference.softmax(scores), reference.softmax(scores, 0.25)]


def run_concatenate(x: Tensor) -> list[Tensor]:
    maps = (x, other(x), nhwc(x[:, :3]))
    out = torch.empty(x.shape[0], sum(m.shape[1] for m in maps), *x.shape[2:], dtype=x.dtype)
    return [cpu.concatenate_out(maps, nhwc(out))]


def as_tokens(x: Tensor) -> list[Tensor]:
    """Queries, keys and values of two heads, parts of one map, at most 100 tokens."""
    width = x.shape[3]
    whole = nhwc(torch.cat([x] * 6, dim=1)[:, :, : 100 // max(width, 1) + 1])
    channels = whole.permute(0, 2, 3, 1).flatten(1, 2)
    largest = channels.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1.0)
    channels = (channels / largest * 3).to(x.dtype)
    return [part.unflatten(2, (2, -1)) for part in channels.chunk(3, dim=2)]


def run_attention(x: Tensor) -> list[Tensor]:
    q, k, v = as_tokens(x)
    first = torch.empty(q.shape, dtype=x.dtype)
    few = torch.empty(q[:, :5].shape, dtype=x.dtype)
    asking = q[:, :5].contiguous()
    return [cpu.attention_out(q, k, v, first), cpu.attention_out(asking, k, v, few, scale=2.0)]


def attention(x: Tensor, computed: torch.dtype) -> list[Tensor]:
    q, k, v = (t.to(computed) for t in as_tokens(x))
    return [reference.attention(q, k, v), reference.attention(q[:, :5], k, v, 2.0)]


# Each op: its kernel on x, and its reference on x in the given type.
OPS = {
    "elu": (run_elu, lambda x, t: [reference.elu(x.to(t))]),
    "add_elu": (run_add_elu, lambda x, t: reference.add_elu(x.to(t), other(x).to(t))),
    "silu": (
        lambda x: [cpu.activation_out(x, torch.empty_like(x), "silu")],
        lambda x, t: [reference.activation(x.to(t), "silu")],
    ),
    "add_activation": (run_add_activation, add_activation),
    "scale_shift": (run_scale_shift, scale_shift),
    "upsample_nearest": (
        run_upsample,
        lambda x, t: [reference.upsample_nearest(x.to(t), *factors) for factors in FACTORS],
    ),
    "depthwise_transposed": (run_depthwise_transposed, depthwise_transposed),
    "depth_to_space": (run_depth_to_space, depth_to_space),
    "softmax": (run_softmax, softmax),
    "concatenate": (
        run_concatenate,
        lambda x, t: [torch.cat((x, other(x), x[:, :3]), dim=1).to(t)],
    ),
    "attention": (run_attention, attention),
    "max_pool5": (
        lambda x: [cpu.max_pool5_out(x, torch.empty_like(x))],
        lambda x, t: [reference.max_pool5(x.to(t))],
    ),
    "avg_pool5": (
        lambda x: [cpu.avg_pool5_out(x, torch.empty_like(x))],
        lambda x, t: [reference.avg_pool5(x.to(t))],
    ),
    "mean_pool2": (run_mean_pool2, mean_pool2),
    "resize": (run_resize, lambda x, t: [reference.resize_add(x.to(t), size) for size in SIZES]),
    "resize_add": (run_resize_add, resize_add),
}


def worst(y: Tensor, exact: Tensor) -> float:
    return (y.double() - exact).abs().max().item() if exact.numel() else 0.0


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", INPUTS)
def test_within_twice_eager(name, op, dtype):
    run, specification = OPS[op]
    x = nhwc(INPUTS[name]().to(dtype))
    exact = specification(x, torch.float64)
    eager = specification(x, dtype)
    ours = run(x)
    assert len(ours) == len(exact) == len(eager)
    for mine, low, truth in zip(ours, eager, exact, strict=True):
        # Floor: two roundings of the largest output.
        floor = 2 * EPSILON[dtype] * truth.abs().max().item() if truth.numel() else 0.0
        assert mine.shape == truth.shape
        assert worst(mine, truth) <= 2 * worst(low, truth) + floor
    for level in LEVELS:
        with ops.isa(level):
            again = run(x)
        assert all(torch.equal(a, b) for a, b in zip(again, ours, strict=True)), level


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("op", OPS)
def test_independent_of_threads_and_batch(op, dtype, set_threads):
    run, _ = OPS[op]
    x = nhwc((noise_like(1, 70, 66, 70) - 2.3).to(dtype))
    set_threads(1)
    one = run(x)
    batch = nhwc(torch.cat((x.flip(2), x, x * 3)))
    among = run(batch)
    for threads in (2, 3):
        set_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(run(x), one, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(run(batch), among, strict=True))
    if op in ("elu", "max_pool5", "avg_pool5", "resize"):
        assert all(torch.equal(a[1:2], b) for a, b in zip(among, one, strict=True))


@pytest.mark.parametrize("dtype", EPSILON)
def test_samples_of_two_operands_are_independent(dtype):
    a, b = (nhwc((noise_like(4, 24, 8, 6, seed=s) - 2.3).to(dtype)) for s in (1, 2))
    small = nhwc(b[:, :, :4, :3])

    def run(part):
        total, out = torch.empty_like(a[part]), torch.empty_like(a[part])
        cpu.add_elu_out(a[part], b[part], total=total, out=out)
        pooled = cpu.mean_pool2_out(a[part], empty_nhwc(a[part], 4, 3), b=b[part])
        resized = cpu.resize_add_out(small[part], torch.empty_like(a[part]), a=a[part])
        return total, out, pooled, resized

    for whole, alone in zip(run(slice(None)), run(slice(2, 3)), strict=True):
        assert torch.equal(whole[2:3], alone)


# Pools -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("shape", [(2, 40, 9, 37), (1, 3, 1, 1), (1, 17, 70, 4), (1, 65, 3, 2)])
def test_max_pool_is_exact(shape, dtype):
    for x in (noise_like(*shape) - 40.0, -noise_like(*shape).abs() * 1e30, checkerboard(*shape)):
        x = nhwc(x.to(dtype))
        y = cpu.max_pool5_out(x, torch.empty_like(x))
        assert torch.equal(y, F.max_pool2d(x, 5, stride=1, padding=2))


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("channels", [1, 7, 48])
def test_max_pool_of_infinities_zeros_and_nans(channels, level, dtype):
    x = torch.full((1, channels, 12, 12), -torch.inf)
    x[..., 0, :] = torch.inf
    x[..., 6, 6] = -torch.nan
    x[..., 11, 0] = torch.nan
    x[..., 11, 6] = -0.0
    x[..., 10, 6] = 0.0
    x[..., 11, 11] = torch.finfo(dtype).min
    x = nhwc(x.to(dtype))
    with ops.isa(level):
        y = cpu.max_pool5_out(x, torch.empty_like(x))
    expected = F.max_pool2d(x, 5, stride=1, padding=2)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    assert (y == -torch.inf).any()
    assert y.isnan().any()


def test_average_counts_zeros():
    x = nhwc(torch.ones(1, 20, 4, 6))
    y = cpu.avg_pool5_out(x, torch.empty_like(x))
    counts = torch.tensor([3.0, 4, 4, 3])[:, None] * torch.tensor([3.0, 4, 5, 5, 4, 3])
    torch.testing.assert_close(y, (counts / 25).expand(1, 20, 4, 6))


# Resize ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize(
    ("before", "after"),
    [((4, 4), (8, 8)), ((7, 5), (13, 11)), ((16, 16), (5, 31)), ((1, 3), (6, 6)), ((9, 9), (1, 2))],
)
def test_resize_agrees_with_torch(before, after, dtype):
    x = nhwc((noise_like(2, 21, *before) - 2.3).to(dtype))
    y = cpu.resize_add_out(x, empty_nhwc(x, *after))
    expected = F.interpolate(x, size=after, mode="bilinear", align_corners=True)
    torch.testing.assert_close(y, expected, atol=8 * EPSILON[dtype], rtol=2 * EPSILON[dtype])


@pytest.mark.parametrize("dtype", EPSILON)
def test_resize_to_the_same_size_is_the_identity(dtype):
    x = nhwc((noise_like(2, 21, 9, 7) - 2.3).to(dtype))
    assert torch.equal(cpu.resize_add_out(x, torch.empty_like(x)), x)
    total = torch.empty_like(x)
    cpu.add_elu_out(x, other(x), total=total)
    assert torch.equal(cpu.resize_add_out(x, torch.empty_like(x), a=other(x)), total)


def test_resize_keeps_input_pixels_exactly():
    # at an integer factor between the corners every (H - 1) / (h - 1)-th pixel is one of the input
    x = nhwc(noise_like(1, 19, 6, 8) - 2.3)
    y = cpu.resize_add_out(x, empty_nhwc(x, 36, 22))
    assert torch.equal(y[:, :, ::7, ::3], x)


# Buffers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("shape", [(2, 24, 6, 6), (1, 3, 5, 7)])
def test_in_place_forms(shape, dtype):
    a, b = (nhwc((noise_like(*shape, seed=s) - 1.0).to(dtype)) for s in (1, 2))
    total, out = torch.empty_like(a), torch.empty_like(a)
    cpu.add_elu_out(a, b, total=total, out=out)
    curved = cpu.elu_out(a, torch.empty_like(a))
    assert torch.equal(cpu.elu_out(*[a.clone()] * 2), curved)

    first, second = a.clone(), b.clone()
    cpu.add_elu_out(first, second, total=first, out=second)
    assert torch.equal(first, total)
    assert torch.equal(second, out)
    for name, expected in (("total", total), ("out", out)):
        alone = torch.empty_like(a)
        cpu.add_elu_out(a, b, **{name: alone})
        assert torch.equal(alone, expected)

    small = nhwc(b[:, :, :3, :4])
    expected = cpu.resize_add_out(small, torch.empty_like(a), a=a)
    inplace = a.clone()
    assert cpu.resize_add_out(small, inplace, a=inplace) is inplace
    assert torch.equal(inplace, expected)


@pytest.mark.parametrize("dtype", EPSILON)
def test_in_place_forms_of_activations(dtype):
    a, b = (nhwc((noise_like(2, 24, 6, 6, seed=s) - 1.0).to(dtype)) for s in (1, 2))
    scale, shift = rows_of(a)
    curved = cpu.activation_out(a, torch.empty_like(a), "silu")
    assert torch.equal(cpu.activation_out(*[a.clone()] * 2, "silu"), curved)
    affine = cpu.scale_shift_out(a, scale, shift, torch.empty_like(a), activation="silu")
    twin = a.clone()
    assert torch.equal(cpu.scale_shift_out(twin, scale, shift, twin, activation="silu"), affine)
    total = torch.empty_like(a)
    cpu.add_activation_out(a, b, total=total, weights=WEIGHTS)
    first, second = a.clone(), b.clone()
    cpu.add_activation_out(first, second, total=second, weights=WEIGHTS)
    assert torch.equal(second, total)


@pytest.mark.parametrize("to", EPSILON)
@pytest.mark.parametrize("of", EPSILON)
def test_copies_of_channels_leave_the_others_alone(of, to):
    x = nhwc(noise_like(2, 37, 5, 4).to(of))
    out = nhwc(torch.full((2, 50, 5, 4), 77.0, dtype=to))
    cpu.copy_channels_out(x, out, 21, x_first=9, out_first=13)
    assert torch.equal(out[:, 13:34], x[:, 9:30].to(to))
    assert (out[:, :13] == 77).all()
    assert (out[:, 34:] == 77).all()


def test_scale_and_shift_take_both_layouts_and_types():
    x = noise_like(2, 5, 7, 3) - 2.3
    scale, shift = rows_of(x)
    y = cpu.scale_shift_out(x, scale, shift, torch.empty_like(x))
    assert torch.equal(cpu.scale_shift_out(nhwc(x), scale, shift, torch.empty_like(nhwc(x))), y)
    half = torch.empty_like(x, dtype=torch.bfloat16)
    assert torch.equal(cpu.scale_shift_out(x, scale, shift, half), y.bfloat16())


# Attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize(
    ("tokens", "keys", "heads", "width", "value_width"),
    [
        (64, 64, 2, 16, 16), (1, 1, 1, 1, 1), (5, 77, 3, 40, 33), (300, 33, 1, 3, 65),
        (15, 40, 8, 8, 8),
    ],
)  # fmt: skip
def test_attention_agrees_with_torch(tokens, keys, heads, width, value_width, dtype):
    q = noise_like(2, tokens, heads, width).to(dtype)
    k = noise_like(2, keys, heads, width, seed=1).to(dtype)
    v = noise_like(2, keys, heads, value_width, seed=2).to(dtype)
    out = torch.empty(2, tokens, heads, value_width, dtype=dtype)
    exact = reference.attention(q.double(), k.double(), v.double())
    twin = F.scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in (q, k, v)))
    torch.testing.assert_close(exact, twin.transpose(1, 2))
    assert cpu.attention_out(q, k, v, out) is out
    assert worst(out, exact) <= 4 * EPSILON[dtype] * max(v.abs().max().item(), 1.0)
    for level in LEVELS:
        with ops.isa(level):
            assert torch.equal(cpu.attention_out(q, k, v, torch.empty_like(out)), out), level


def test_attention_of_large_scores_is_sharp():
    """The largest score alone counts where the others are far below; none overflows."""
    q, k, v = (noise_like(1, 40, 1, 8, seed=s) for s in range(3))
    out = cpu.attention_out(q, k, v, torch.empty_like(q), scale=1e6)
    best = (q[0, :, 0].double() @ k[0, :, 0].double().T).argmax(dim=1)
    torch.testing.assert_close(out[0, :, 0], v[0, best, 0])
    even = cpu.attention_out(q, k, v, torch.empty_like(q), scale=0.0)
    mean = v.mean(dim=1, keepdim=True)
    torch.testing.assert_close(even, mean.expand_as(even))


def test_attention_of_nan_stays_in_its_head_and_sample():
    q, k, v = (noise_like(3, 9, 2, 8, seed=s) for s in range(3))
    clean = cpu.attention_out(q, k, v, torch.empty_like(q))
    k[1, 4, 1, 2] = torch.nan
    y = cpu.attention_out(q, k, v, torch.empty_like(q))
    assert y[1, :, 1].isnan().all()
    y[1, :, 1] = clean[1, :, 1]
    assert torch.equal(y, clean)


def test_attention_reads_parts_of_a_map_and_writes_one():
    """Orders of the channels of q, k and v in one map; the output's neighbours are left alone."""
    n, tokens, heads, width = 2, 12, 3, 8
    q, k, v = (noise_like(n, tokens, heads, width, seed=s) for s in range(3))
    expected = cpu.attention_out(q, k, v, torch.empty_like(q))
    one_by_one = torch.cat([t.flatten(2) for t in (q, k, v)], dim=2)
    parts = [t.unflatten(2, (heads, width)) for t in one_by_one.chunk(3, dim=2)]
    assert torch.equal(cpu.attention_out(*parts, torch.empty_like(q)), expected)
    by_head = torch.stack((q, k, v), dim=3)  # (N, L, heads, 3, D)
    assert torch.equal(cpu.attention_out(*by_head.unbind(3), torch.empty_like(q)), expected)
    room = torch.full((n, tokens, heads, 3 * width), 77.0)
    cpu.attention_out(q, k, v, room[..., width : 2 * width])
    assert torch.equal(room[..., width : 2 * width], expected)
    assert (room[..., :width] == 77).all()
    assert (room[..., 2 * width :] == 77).all()


def test_elementwise_ops_take_any_dense_layout():
    flat = noise_like(1001) - 2.3
    assert torch.equal(
        cpu.elu_out(flat, torch.empty_like(flat)).view(1, 7, 11, 13),
        cpu.elu_out(flat.view(1, 7, 11, 13), torch.empty(1, 7, 11, 13)),
    )


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("channels", [3, 37, 131])
def test_neighbouring_memory_is_left_alone(channels, dtype):
    room = torch.full((4, 6, 4, channels), 77.0, dtype=dtype)
    out = room[1:3].permute(0, 3, 1, 2)
    x = nhwc(noise_like(2, channels, 6, 4).to(dtype))
    for write in (
        lambda: cpu.elu_out(x, out),
        lambda: cpu.scale_shift_out(x, None, None, out),
        lambda: cpu.group_norm_out(x, 1, None, None, out),
        lambda: cpu.concatenate_out((x[:, :0], x), out),
        lambda: cpu.upsample_nearest_out(nhwc(x[:, :, :2, :2]), out),
        lambda: cpu.depthwise_transposed_out(x, noise_like(3, 3, channels), None, out, padding=1),
        lambda: cpu.depth_to_space_out(nhwc(x[:, :, :3, :2].repeat(1, 4, 1, 1)), out, 2),
        lambda: cpu.softmax_in_place(out.permute(0, 2, 3, 1)),
        lambda: cpu.max_pool5_out(x, out),
        lambda: cpu.avg_pool5_out(x, out),
        lambda: cpu.resize_add_out(nhwc(x[:, :, :3]), out, a=x),
        lambda: cpu.mean_pool2_out(nhwc(x.repeat(1, 1, 2, 2)), out),
    ):
        write()
        assert (room[[0, 3]] == 77.0).all()


@pytest.mark.parametrize("shape", [(2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty_maps(shape):
    x = torch.empty(shape).contiguous(memory_format=torch.channels_last)
    for write in (cpu.elu_out, cpu.max_pool5_out, cpu.avg_pool5_out):
        assert write(x, torch.empty_like(x)).shape == shape
    assert cpu.scale_shift_out(x, None, None, torch.empty_like(x)).shape == shape
    assert cpu.upsample_nearest_out(x, torch.empty_like(x)).shape == shape
    assert cpu.concatenate_out((x,), torch.empty_like(x)).shape == shape
    ones = torch.ones(1, 1, shape[1])
    assert cpu.depthwise_transposed_out(x, ones, None, torch.empty_like(x)).shape == shape
    assert cpu.depth_to_space_out(x, torch.empty_like(x), 1).shape == shape
    assert cpu.softmax_in_place(torch.empty(shape)).shape == shape
    half = empty_nhwc(x, shape[2] // 2, shape[3] // 2)
    assert cpu.mean_pool2_out(x, half) is half
    assert cpu.resize_add_out(x, half) is half


def test_nan_stays_in_its_sample():
    x = nhwc(noise_like(3, 19, 8, 8))
    dirty = x.clone()
    dirty[1, 2, 3, 4] = torch.nan
    for name, (run, _) in OPS.items():
        for y, clean in zip(run(dirty), run(x), strict=True):
            assert torch.equal(y[[0, 2]], clean[[0, 2]]), name
            # a resize to few pixels may pass it by
            assert y[1].isnan().any() or y.shape[2:].numel() <= 6, name


# Refusals ----------------------------------------------------------------------------------------

TOKENS = noise_like(2, 9, 2, 8)
MAP = nhwc(noise_like(2, 4, 6, 6))
SMALL = nhwc(noise_like(2, 4, 3, 3))
PLAIN = noise_like(2, 4, 6, 6)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: cpu.elu_out(MAP, SMALL), ValueError, r"x \(2, 4, 6, 6\), out \(2, 4, 3, 3\)"),
        (lambda: cpu.elu_out(MAP, PLAIN), ValueError, "contiguous, or all channels-last"),
        (lambda: cpu.elu_out(MAP, MAP.bfloat16()), TypeError, "out torch.bfloat16"),
        (lambda: cpu.elu_out(MAP.double(), MAP.double()), TypeError, "x torch.float64"),
        (lambda: cpu.elu_out(MAP.to("meta"), MAP.to("meta")), ValueError, "x is on meta"),
        (lambda: cpu.add_elu_out(MAP, MAP), ValueError, "neither was given"),
        (lambda: cpu.add_elu_out(MAP, SMALL, out=MAP), ValueError, r"b \(2, 4, 3, 3\)"),
        (lambda: cpu.add_elu_out(MAP, MAP, total=MAP, out=MAP), ValueError, "overlaps"),
        (lambda: cpu.activation_out(MAP, MAP, "mish"), ValueError, "one of none, .* got 'mish'"),
        (lambda: cpu.scale_shift_out(MAP, MAP[:, :, 0, 0], None, PLAIN), ValueError, "both cont"),
        (
            lambda: cpu.scale_shift_out(MAP, torch.ones(4), None, torch.empty_like(MAP)),
            ValueError,
            r"scale must have shape \(2, 4\); got \(4,\)",
        ),
        (
            lambda: cpu.copy_channels_out(MAP, torch.empty_like(MAP), 3, x_first=2),
            ValueError,
            "3 channels must lie within x from channel 2 .* these have 4 and 4",
        ),
        (lambda: cpu.copy_channels_out(MAP, MAP, 4), ValueError, "lie apart from x"),
        (lambda: cpu.copy_channels_out(SMALL, MAP, 4), ValueError, "out must have shape"),
        (lambda: cpu.concatenate_out((MAP, MAP), MAP), ValueError, "out must have 8 channels"),
        (
            lambda: cpu.upsample_nearest_out(SMALL, nhwc(noise_like(2, 4, 7, 6))),
            ValueError,
            r"out must have shape \(2, 4, 6, 6\)",
        ),
        (
            lambda: cpu.depthwise_transposed_out(SMALL, torch.ones(3, 3, 3), None, MAP),
            ValueError,
            r"weight must have shape \(3, 3, 4\)",
        ),
        (
            lambda: cpu.depthwise_transposed_out(SMALL, torch.ones(3, 3, 4), None, MAP, stride=0),
            ValueError,
            "taps and stride must be in",
        ),
        (lambda: cpu.depth_to_space_out(MAP, SMALL, 3), ValueError, r"3\^2 groups of channels"),
        (
            lambda: cpu.depth_to_space_out(MAP, nhwc(noise_like(2, 1, 12, 12)), 2, first=1),
            ValueError,
            "12x12 from pixel 1 of 12x12",
        ),
        (lambda: cpu.softmax_in_place(MAP), ValueError, "contiguous"),
        (lambda: cpu.softmax_in_place(PLAIN.double()), TypeError, "x torch.float64"),
        (lambda: cpu.attention_out(TOKENS, TOKENS, TOKENS, TOKENS), ValueError, "lie apart from q"),
        (
            lambda: cpu.attention_out(TOKENS, TOKENS[:, :0], TOKENS[:, :0], TOKENS.clone()),
            ValueError,
            "k and v must have tokens",
        ),
        (
            lambda: cpu.attention_out(TOKENS, TOKENS[..., :4], TOKENS, TOKENS.clone()),
            ValueError,
            r"k must have shape \(2, 9, 2, 8\)",
        ),
        (
            lambda: cpu.attention_out(TOKENS[..., ::2], *[TOKENS[..., :4]] * 2, TOKENS.clone()),
            ValueError,
            "out must have shape",
        ),
        (
            lambda: cpu.attention_out(
                TOKENS[..., ::2], *[TOKENS[..., :4]] * 2, torch.empty(2, 9, 2, 4)
            ),
            ValueError,
            "q must have elements of a head side by side",
        ),
        (
            lambda: cpu.attention_out(
                TOKENS, TOKENS, TOKENS, torch.empty(2, 9, 1, 8).expand(2, 9, 2, 8)
            ),
            ValueError,
            "heads of out must lie apart",
        ),
        (lambda: cpu.attention_out(*[TOKENS[0]] * 4), ValueError, r"\(N, tokens, heads, width\)"),
        (lambda: cpu.max_pool5_out(MAP, MAP), ValueError, r"out of shape .* lie apart from x"),
        (lambda: cpu.max_pool5_out(PLAIN, MAP), ValueError, "x must be channels-last"),
        (
            lambda: cpu.max_pool5_out(MAP[0], MAP),
            ValueError,
            r"\(N, C, H, W\); got \(4, 6, 6\)",
        ),
        (
            lambda: cpu.avg_pool5_out(MAP, SMALL),
            ValueError,
            r"\(2, 4, 6, 6\); got \(2, 4, 3, 3\)",
        ),
        (
            lambda: cpu.mean_pool2_out(SMALL, MAP),
            ValueError,
            r"even .* got shape \(2, 4, 3, 3\)",
        ),
        (lambda: cpu.mean_pool2_out(MAP, PLAIN), ValueError, r"out .* \(2, 4, 3, 3\); got"),
        (lambda: cpu.mean_pool2_out(MAP, SMALL, b=SMALL), ValueError, "b must have shape"),
        (lambda: cpu.mean_pool2_out(MAP, SMALL.bfloat16()), TypeError, "out torch.bfloat16"),
        (lambda: cpu.resize_add_out(SMALL, MAP[:1]), ValueError, r"\(2, 4, H, W\) for x"),
        (lambda: cpu.resize_add_out(SMALL, MAP, a=SMALL), ValueError, "a must have shape"),
        (lambda: cpu.resize_add_out(MAP, MAP), ValueError, "out .* lie apart from x"),
        (lambda: cpu.resize_add_out(nhwc(MAP[:, :, :0]), MAP), ValueError, "has no pixels"),
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_refuses_buffers_that_overlap_in_part():
    room = noise_like(3, 6, 6, 4).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match=r"out of shape .* must be x or lie apart from it"):
        cpu.elu_out(room[:2], room[1:])

"""C++ kernels of the CPU engine, which write into preallocated buffers.

Each `NAME_out` is specified by `reference.NAME`. Calls bypass the dispatcher and autograd:

- Tensors are (N, C, H, W) on the CPU, float32 or bfloat16, all of one dtype and channels-last
  (`elu_out` and `add_elu_out`: all contiguous, or all channels-last). Arithmetic is float32.
- Nothing is allocated. Outputs do not overlap inputs; an op that may run in place also accepts an
  output that is exactly an input's memory.
- Results are bit-identical for every instruction set (`ops.isa`), thread count and batch.
- Anything else raises TypeError or ValueError.

The CPU engine also uses `ops.instance_norm_plus_out`, which documents its own rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ncsn_fast.ops import extension
from ncsn_fast.ops.activations import activation_code
from ncsn_fast.ops.addresses import (
    DENSE,
    NCHW,
    NHWC,
    NONE,
    Array,
    array,
    dense,
    strided,
)
from ncsn_fast.ops.checks import KERNEL_DTYPES, check_group_norm, check_norm_out
from ncsn_fast.ops.extension import _C, forced_isa
from ncsn_fast.ops.map_checks import (
    check_flat,
    check_maps,
    check_outputs,
    check_types,
    is_bfloat16,
    map_of,
    nhwc,
)


def elu_out(x: Tensor, out: Tensor) -> Tensor:
    """Writes out = elu(x); out may be x."""
    return activation_out(x, out, "elu")


def activation_out(x: Tensor, out: Tensor, activation: str) -> Tensor:
    """Writes out = activation(x), an activation of `ops.activations`; out may be x."""
    check_flat(x=x, out=out)
    check_outputs({"x": x}, {"out": out}, in_place=True)
    _C.add_activation(
        dense("x", x, x.dtype), NONE, NONE, dense("out", out, x.dtype), 1, x.numel(),
        is_bfloat16(x), activation_code(activation), 1.0, 1.0, (0, 0, 0, 0), DENSE,
        forced_isa.get(),
    )  # fmt: skip
    return out


def add_elu_out(
    a: Tensor, b: Tensor, *, total: Tensor | None = None, out: Tensor | None = None
) -> None:
    """Writes total = a + b, out = elu(a + b), or both; each may be a or b."""
    add_activation_out(a, b, total=total, out=out, activation="elu")


def add_activation_out(
    a: Tensor,
    b: Tensor,
    *,
    total: Tensor | None = None,
    out: Tensor | None = None,
    activation: str = "none",
    weights: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Writes total = s, out = activation(s), or both, of s = w_a a + w_b b; each may be a or b."""
    named = (("total", total), ("out", out))
    outputs = {key: t for key, t in named if t is not None}
    if not outputs:
        raise ValueError("the sum is written to total, out or both; neither was given")
    check_flat(a=a, b=b, **outputs)
    check_outputs({"a": a, "b": b}, outputs, in_place=True)
    written, curved = (NONE if t is None else dense(key, t, a.dtype) for key, t in named)
    _C.add_activation(
        dense("a", a, a.dtype), dense("b", b, a.dtype), written, curved, 1, a.numel(),
        is_bfloat16(a), activation_code(activation), *weights, (0, 0, 0, 0), DENSE,
        forced_isa.get(),
    )  # fmt: skip


def group_norm_out(
    x: Tensor,
    groups: int,
    gamma: Tensor | None,
    beta: Tensor | None,
    out: Tensor,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
) -> Tensor:
    """Writes `reference.group_norm` of x to out, which may be x.

    x and out are each float32 or bfloat16, and share one layout (contiguous or channels-last).
    """
    check_group_norm(
        x, groups, {"gamma": gamma, "beta": beta}, {"add": add, "scale": scale, "shift": shift},
        activation,
    )  # fmt: skip
    check_norm_out(x, out)
    parameters = (gamma, beta, add, scale, shift)
    extension.group_norm(x, groups, parameters, out, activation, eps, forced_isa.get())
    return out


def scale_shift_out(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    *,
    activation: str = "none",
) -> Tensor:
    """Writes activation(scale x + shift) to out, which may be x.

    scale and shift are (N, C), float32 and contiguous; x and out are as in `group_norm_out`.
    """
    if x.ndim != 4:
        raise ValueError(f"x must have shape (N, C, H, W); got {tuple(x.shape)}")
    check_norm_out(x, out)
    layout = NCHW if x.is_contiguous() and out.is_contiguous() else NHWC
    n, c, height, width = x.shape
    _C.scale_shift(
        array("x", x, x.shape, x.dtype, layout=layout),
        array("out", out, x.shape, out.dtype, layout=layout),
        array("scale", scale, (n, c), torch.float32), array("shift", shift, (n, c), torch.float32),
        n, c, height * width, layout is NHWC, is_bfloat16(x), is_bfloat16(out),
        activation_code(activation), forced_isa.get(),
    )  # fmt: skip
    return out


def _token_layout(name: str, t: Tensor) -> tuple[int, int]:
    """Returns the elements between two tokens and between two heads of (N, tokens, heads, D)."""
    sample, token, head, element = t.stride()
    n, tokens, _, width = t.shape
    token = token if tokens > 1 else sample
    if (width > 1 and element != 1) or (n > 1 and sample != tokens * token):
        raise ValueError(
            f"{name} must have elements of a head side by side, and samples one after another; got "
            f"shape {tuple(t.shape)} with strides {t.stride()}"
        )
    return token, head


def copy_channels_out(
    x: Tensor, out: Tensor, channels: int, *, x_first: int = 0, out_first: int = 0
) -> Tensor:
    """Writes channels x_first, ... of x to channels out_first, ... of out; the others are kept.

    Each of x and out is float32 or bfloat16.
    """
    check_maps(x.shape, x=x)
    check_maps((x.shape[0], out.shape[1], *x.shape[2:]), out=out)
    check_outputs({"x": x}, {"out": out})
    n, _, height, width = x.shape
    _C.copy_channels(
        map_of("x", x), map_of("out", out), n * height * width, channels, x.shape[1], x_first,
        out.shape[1], out_first, is_bfloat16(x), is_bfloat16(out), forced_isa.get(),
    )  # fmt: skip
    return out


def concatenate_out(maps: Sequence[Tensor], out: Tensor) -> Tensor:
    """Writes the maps to out, one after another along the channels."""
    total = sum(x.shape[1] for x in maps)
    if out.ndim != 4 or out.shape[1] != total:
        raise ValueError(f"out must have {total} channels; got shape {tuple(out.shape)}")
    first = 0
    for x in maps:
        copy_channels_out(x, out, x.shape[1], out_first=first)
        first += x.shape[1]
    return out


def upsample_nearest_out(x: Tensor, out: Tensor) -> Tensor:
    """Writes x, each pixel repeated, to out, whose size is a multiple of that of x."""
    check_maps(x.shape, x=x)
    n, c, height, width = x.shape
    rows, columns = (
        size // max(old, 1) for size, old in zip(out.shape[2:], x.shape[2:], strict=True)
    )
    check_maps((n, c, height * rows, width * columns), x.dtype, out=out)
    check_outputs({"x": x}, {"out": out})
    _C.upsample_nearest(
        map_of("x", x),
        map_of("out", out),
        nhwc(x),
        rows,
        columns,
        is_bfloat16(x),
        forced_isa.get(),
    )
    return out


def depthwise_transposed_out(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """Writes the transposed convolution of x with one kernel for each channel to out.

    Args:
        weight: float32 (k, k, C), contiguous.
        bias: float32 (C,), or None.
        out: (N, C, H', W') of any size; what no pixel of x reaches is the bias.
    """
    check_maps(x.shape, x=x)
    n, c, height, width = x.shape
    check_maps((n, c, *out.shape[2:]), x.dtype, out=out)
    check_outputs({"x": x}, {"out": out})
    taps, (rows, columns) = weight.shape[0], out.shape[2:]
    _C.depthwise_transposed(
        map_of("x", x), array("weight", weight, (taps, taps, c), torch.float32),
        array("bias", bias, (c,), torch.float32), map_of("out", out), (n, height, width, c),
        rows, columns, taps, stride, padding, is_bfloat16(x), forced_isa.get(),
    )  # fmt: skip
    return out


def depth_to_space_out(z: Tensor, out: Tensor, factor: int, *, first: int = 0) -> Tensor:
    """Writes squares of factor x factor pixels, which are groups of channels of z, to out.

    Args:
        z: (N, factor^2 C, H, W); groups of C channels are the pixels of a square, row by row.
        out: (N, C, H', W'): rows and columns first, first + 1, ... of the squares together.
    """
    n, channels, height, width = z.shape
    check_maps(z.shape, z=z)
    c = channels // max(factor, 1) ** 2
    if factor < 1 or c * factor**2 != channels:
        raise ValueError(f"z must have {factor}^2 groups of channels; got shape {tuple(z.shape)}")
    check_maps((n, c, *out.shape[2:]), z.dtype, out=out)
    check_outputs({"z": z}, {"out": out})
    rows, columns = out.shape[2:]
    _C.depth_to_space(
        map_of("z", z), map_of("out", out), (n, height, width, c), rows, columns, factor, first,
        is_bfloat16(z), forced_isa.get(),
    )  # fmt: skip
    return out


def softmax_in_place(x: Tensor, scale: float = 1.0) -> Tensor:
    """Replaces each row of x (..., C), contiguous, by the softmax of scale * row."""
    check_types(x.dtype, {"x": x})
    columns = x.shape[-1]
    rows = x.numel() // columns if columns else 0
    _C.softmax(
        array("x", x, tuple(x.shape), x.dtype), rows, columns, scale, is_bfloat16(x),
        forced_isa.get(),
    )  # fmt: skip
    return x


def attention_out(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, scale: float | None = None
) -> Tensor:
    """Writes softmax(scale q k^T) v of each sample and head to out; scale is 1 / sqrt(D) if None.

    Args:
        q, out: (N, L, heads, D) and (N, L, heads, E).
        k, v: (N, M, heads, D) and (N, M, heads, E), M at least 1.
        All are float32, or all bfloat16; strides of tokens and heads are free (parts of one map
        of q, k and v will do), elements of a head lie side by side, and samples L or M tokens
        apart.
    """
    tensors = {"q": q, "k": k, "v": v, "out": out}
    check_types(q.dtype, tensors)
    if any(t.ndim != 4 for t in tensors.values()):
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"all must have shape (N, tokens, heads, width); got {shapes}")
    (n, queries, heads, width), (keys, value_width) = q.shape, (k.shape[1], v.shape[3])
    for name, t, shape in (
        ("k", k, (n, keys, heads, width)), ("v", v, (n, keys, heads, value_width)),
        ("out", out, (n, queries, heads, value_width)),
    ):  # fmt: skip
        if t.shape != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(t.shape)}")
    if keys == 0 and out.numel():
        raise ValueError(f"k and v must have tokens; got shape {tuple(k.shape)}")
    layouts = {name: _token_layout(name, t) for name, t in tensors.items()}
    check_outputs({"q": q, "k": k, "v": v}, {"out": out})
    q_at, k_at, v_at, out_at = (strided(name, t) for name, t in tensors.items())
    _C.attention(
        q_at, k_at, v_at, out_at, (n, heads, queries, keys, width, value_width), layouts["q"],
        layouts["k"], layouts["v"], layouts["out"], width**-0.5 if scale is None else scale,
        is_bfloat16(q), forced_isa.get(),
    )  # fmt: skip
    return out


def max_pool5_out(x: Tensor, out: Tensor) -> Tensor:
    """Writes the 5x5 maximum of x, stride 1, padding 2, to out."""
    check_maps(x.shape, x=x, out=out)
    check_outputs({"x": x}, {"out": out})
    _C.max_pool5(
        map_of("x", x), map_of("out", out), nhwc(x), is_bfloat16(x), DENSE, forced_isa.get()
    )
    return out


def avg_pool5_out(x: Tensor, out: Tensor) -> Tensor:
    """Writes the 5x5 average of x, stride 1, zero padding 2 (zeros counted), to out."""
    check_maps(x.shape, x=x, out=out)
    check_outputs({"x": x}, {"out": out})
    _C.avg_pool5(
        map_of("x", x), map_of("out", out), nhwc(x), is_bfloat16(x), DENSE, forced_isa.get()
    )
    return out


def mean_pool2_out(a: Tensor, out: Tensor, *, b: Tensor | None = None) -> Tensor:
    """Writes the mean of each 2x2 square of a, or of a + b, to out.

    Height and width must be even.
    """
    inputs = {"a": a} if b is None else {"a": a, "b": b}
    check_maps(a.shape, **inputs)
    n, c, height, width = a.shape
    if height % 2 or width % 2:
        raise ValueError(f"a must have even height and width; got shape {tuple(a.shape)}")
    check_maps((n, c, height // 2, width // 2), a.dtype, out=out)
    check_outputs(inputs, {"out": out})
    _C.mean_pool2(
        map_of("a", a),
        map_of("b", b),
        map_of("out", out),
        nhwc(a),
        is_bfloat16(a),
        forced_isa.get(),
    )
    return out


def resize_add_out(x: Tensor, out: Tensor, *, a: Tensor | None = None) -> Tensor:
    """Writes a + resize(x), or resize(x) alone, at the size of out; out may be a."""
    check_maps(x.shape, x=x)
    if out.ndim != 4 or out.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"out must have shape ({x.shape[0]}, {x.shape[1]}, H, W) for x of shape "
            f"{tuple(x.shape)}; got {tuple(out.shape)}"
        )
    if x.shape[2:].numel() == 0 and out.numel() > 0:
        raise ValueError(
            f"x of shape {tuple(x.shape)} has no pixels to resize to {tuple(out.shape)}"
        )
    check_maps(out.shape, x.dtype, out=out, **({} if a is None else {"a": a}))
    check_outputs({"x": x}, {"out": out})
    if a is not None:
        check_outputs({"a": a}, {"out": out}, in_place=True)
    _C.resize_add(
        map_of("x", x), map_of("a", a), map_of("out", out), nhwc(x), out.shape[2], out.shape[3],
        is_bfloat16(x), forced_isa.get(),
    )  # fmt: skip
    return out


class WinogradWeights(NamedTuple):
    """3x3 weights transformed by `winograd_pack` for `winograd_conv_out`."""

    values: Tensor  # int16 for bfloat16 maps, else float32
    scales: Tensor | None  # float32, for bfloat16 maps
    in_channels: int
    out_channels: int

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the maps that these weights apply to."""
        return torch.float32 if self.scales is None else torch.bfloat16

    def arrays(self) -> tuple[Array, Array]:
        """values and scales, which fit the channels; TypeError or ValueError if they do not."""
        n_values, n_scales = _C.winograd_sizes(self.in_channels, self.out_channels)
        kind = torch.float32 if self.scales is None else torch.int16
        return (
            array("weights.values", self.values, (n_values,), kind),
            array("weights.scales", self.scales, (n_scales,), torch.float32),
        )


def winograd_pack(weight: Tensor, dtype: torch.dtype) -> WinogradWeights:
    """Transforms 3x3 convolution weights for maps of `dtype`.

    Weights are (O, I, 3, 3), float32 or bfloat16; the result takes 4 times the memory.

    For bfloat16 maps the result is 16-bit integers, which are more precise than bfloat16: pass
    float32 weights.
    """
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or weight.numel() == 0:
        raise ValueError(f"weight must have shape (O, I, 3, 3); got {tuple(weight.shape)}")
    if not weight.is_cpu:
        raise ValueError(f"this kernel runs on the CPU; weight is on {weight.device}")
    if weight.dtype not in KERNEL_DTYPES or dtype not in KERNEL_DTYPES:
        raise TypeError(f"weight and maps must be float32 or bfloat16; got {weight.dtype}, {dtype}")
    out_channels, in_channels = weight.shape[:2]
    weight = weight.detach().to(torch.float32).contiguous()
    n_values, n_scales = _C.winograd_sizes(in_channels, out_channels)
    fixed_point = dtype is torch.bfloat16
    values = torch.empty(n_values, dtype=torch.int16 if fixed_point else torch.float32)
    scales = torch.empty(n_scales, dtype=torch.float32) if fixed_point else None
    packed = WinogradWeights(values, scales, in_channels, out_channels)
    _C.winograd_pack(
        array("weight", weight, (out_channels, in_channels, 3, 3), torch.float32),
        *packed.arrays(), in_channels, out_channels, fixed_point,
    )  # fmt: skip
    return packed


def winograd_pays(
    in_channels: int, out_channels: int, height: int, width: int, dilation: int
) -> bool:
    """Returns whether `winograd_conv_out` is faster than a direct convolution of these sizes.

    It is slower if less than half of the pixels of its tiles lie inside the map (8x8 maps at
    dilation
    4: 0.4 of the speed), or if there are few channels.
    """

    def tiled(size: int) -> int:
        phases = min(dilation, size)
        return phases * 4 * -(-size // (4 * dilation))

    inside = height * width > 0 and tiled(height) * tiled(width) <= 2 * height * width
    return inside and min(in_channels, out_channels) >= 32


def winograd_conv_out(
    x: Tensor,
    weights: WinogradWeights,
    bias: Tensor | None,
    out: Tensor,
    *,
    dilation: int = 1,
    accumulate: bool = False,
) -> Tensor:
    """Writes the 3x3 convolution of x, stride 1, padding = dilation, to out.

    With `accumulate`, adds it to out instead.

    If x holds an infinity, a NaN or a value above 1e37, every 4x4 output tile that it reaches is
    NaN.

    Args:
        x: (N, I, H, W).
        weights: from `winograd_pack` for x's dtype.
        bias: float32 (O,), or None.
        out: (N, O, H, W); must not overlap x.
    """
    check_maps(x.shape, x=x)
    n, channels, height, width = x.shape
    if weights.dtype is not x.dtype:
        raise TypeError(f"weights were packed for {weights.dtype} maps; x is {x.dtype}")
    if weights.in_channels != channels:
        raise ValueError(f"x must have {weights.in_channels} channels; got shape {tuple(x.shape)}")
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1; got {dilation}")
    check_maps((n, weights.out_channels, height, width), x.dtype, out=out)
    check_outputs({"x": x}, {"out": out})
    _C.winograd_conv(
        map_of("x", x), *weights.arrays(),
        array("bias", bias, (weights.out_channels,), torch.float32),
        map_of("out", out) if accumulate else NONE, map_of("out", out), nhwc(x),
        weights.out_channels, dilation, is_bfloat16(x), forced_isa.get(),
    )  # fmt: skip
    return out

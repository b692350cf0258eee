"""Norms, products, attention and resampling of ATen in ONNX's operators."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from ncsn_fast.engines.lowering.graph import UnsupportedNetwork
from ncsn_fast.engines.onnx.translation import Translation, handles, input_of, name_of
from ncsn_fast.engines.onnx.writer import NOTHING, Value, Writer


def _normalised(w: Writer, x: Value, axes: Sequence[int], eps: float) -> Value:
    """(x - mean) / sqrt(var + eps) over some axes, centred before it is scaled."""
    centred = w.op("Sub", x, w.mean(x, *axes))
    return w.op("Div", centred, w.rooted(w.mean(w.op("Mul", centred, centred), *axes), eps))


def _affine(
    t: Translation, x: Value, weight: Value | None, bias: Value | None, shape: Sequence[int]
) -> Value:
    for kind, parameter in (("Mul", weight), ("Add", bias)):
        if parameter is not None:
            x = t.w.op(kind, x, t.reshape(t.w.fp32(parameter), shape))
    return x


@handles("group_norm")
def _group_norm(
    t: Translation, node: fx.Node, x: Value, groups: int, weight: Value | None = None,
    bias: Value | None = None, eps: float = 1e-5, *rest: Any,
) -> Value:  # fmt: skip
    # In reshaping, 0 is the size that was there: the sizes of maps may be open.
    rank, inner = t.rank(node), max(t.rank(node) - 3, 0) * [0]
    grouped = t.w.op("Reshape", t.w.fp32(x), t.w.ints(0, groups, -1, *inner))
    y = _normalised(t.w, grouped, range(2, 3 + len(inner)), eps)
    y = t.w.op("Reshape", y, t.w.ints(0, t.shape(node)[1], *([-1, *inner] if rank > 2 else [])))
    return _affine(t, y, weight, bias, [-1, *[1] * (rank - 2)])


@handles("rms_norm")
def _rms_norm(
    t: Translation, node: fx.Node, x: Value, sizes: Sequence[int], weight: Value | None = None,
    eps: float | None = None,
) -> Value:  # fmt: skip
    rank, x = t.rank(node), t.w.fp32(x)
    squares = t.w.mean(t.w.op("Mul", x, x), *range(rank - len(sizes), rank))
    eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
    return _affine(t, t.w.op("Div", x, t.w.rooted(squares, eps)), weight, None, list(sizes))


@handles("layer_norm")
def _layer_norm(
    t: Translation, node: fx.Node, x: Value, sizes: Sequence[int], weight: Value | None = None,
    bias: Value | None = None, eps: float = 1e-5, *rest: Any,
) -> Value:  # fmt: skip
    rank = t.rank(node)
    y = _normalised(t.w, t.w.fp32(x), range(rank - len(sizes), rank), eps)
    return _affine(t, y, weight, bias, list(sizes))


@handles("instance_norm")
def _instance_norm(
    t: Translation, node: fx.Node, x: Value, weight: Value | None, bias: Value | None,
    mean: Value | None, variance: Value | None, own_statistics: bool, momentum: float, eps: float,
    *rest: Any,
) -> Value:  # fmt: skip
    if not own_statistics:
        return _batch_norm(t, node, x, weight, bias, mean, variance, False, momentum, eps)
    rank = t.rank(node)
    y = _normalised(t.w, t.w.fp32(x), range(2, rank), float(eps))
    return _affine(t, y, weight, bias, [-1, *[1] * (rank - 2)])


@handles("batch_norm")
def _batch_norm(
    t: Translation, node: fx.Node, x: Value, weight: Value | None, bias: Value | None,
    mean: Value | None, variance: Value | None, training: bool, momentum: float, eps: float,
    *rest: Any,
) -> Value:  # fmt: skip
    if training or mean is None or variance is None:
        raise UnsupportedNetwork("batch norm of the batch's own statistics")
    if weight is not None and bias is not None:
        inputs = map(t.w.fp32, (x, weight, bias, mean, variance))
        return t.w.op("BatchNormalization", *inputs, epsilon=float(eps))
    shape = [-1, *[1] * (t.rank(input_of(node)) - 2)]
    mean, variance = (t.reshape(t.w.fp32(v), shape) for v in (mean, variance))
    y = t.w.op("Div", t.w.op("Sub", t.w.fp32(x), mean), t.w.rooted(variance, float(eps)))
    return _affine(t, y, weight, bias, shape)


@handles("_native_batch_norm_legit_no_training")
def _native_batch_norm(t: Translation, node: fx.Node, *args: Any) -> tuple[Value]:
    """Batch norm of a forward that works in place: the first of three results."""
    *parameters, momentum, eps = args
    return (_batch_norm(t, node, *parameters, False, momentum, eps),)


@handles("conv1d", "conv2d", "conv3d")
def _convolution(
    t: Translation, node: fx.Node, x: Value, weight: Value, bias: Value | None = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Value:  # fmt: skip
    axes = t.rank(node) - 2
    each = functools.partial(_each, axes=axes)
    sizes = input_of(node, 1).meta["val"].shape[2:]
    dilations = each(dilation)
    if padding == "same":
        reach = [d * (n - 1) for d, n in zip(dilations, sizes, strict=True)]
        pads = [*(n // 2 for n in reach), *(n - n // 2 for n in reach)]
    else:
        pads = 2 * each(0 if padding == "valid" else padding)
    settings: dict[str, Any] = {
        "strides": each(stride), "pads": pads, "dilations": dilations, "group": groups,
    }  # fmt: skip
    pool = _mean_after(t, node) if {*sizes, *each(stride)} == {1} and not any(pads) else None
    if pool is not None:  # the same before the convolution, of fewer pixels
        x = _mean_of_squares(t, pool, x)
    y = t.w.op("Conv", *(t.low(node, v) for v in (x, weight, bias) if v is not None), **settings)
    if pool is not None:
        t.values[pool] = y
    return y


def _mean_after(t: Translation, node: fx.Node) -> fx.Node | None:
    """Returns the mean over squares of pixels that alone reads a node's value, if one does."""
    readers = list(node.users)
    if len(readers) != 1 or name_of(readers[0]) != "avg_pool2d":
        return None
    arguments = [_pair(a) for a in readers[0].args[1:]]
    square = [2, 2]
    return readers[0] if arguments in ([square], [square, []], [square, square]) else None


def _mean_of_squares(t: Translation, pool: fx.Node, x: Value) -> Value:
    return t.w.op("AveragePool", t.low(pool, x), kernel_shape=[2, 2], strides=[2, 2])


def _each(value: int | Sequence[int], axes: int) -> list[int]:
    """Returns a setting for each axis; a number, alone or in a list, is that of all."""
    return _spread([value] if isinstance(value, int) else list(value), axes)


def _spread(values: list[int], axes: int) -> list[int]:
    return values * axes if len(values) == 1 else values


@handles("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(
    t: Translation, node: fx.Node, x: Value, weight: Value, bias: Value | None = None,
    stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Value:  # fmt: skip
    axes = t.rank(node) - 2
    each = functools.partial(_each, axes=axes)
    kind = t.kind_without_bfloat16(node)
    inputs = [t.w.cast(v, kind) for v in (x, weight, bias) if v is not None]
    return t.w.op(
        "ConvTranspose", *inputs, strides=each(stride), pads=2 * each(padding),
        output_padding=each(output_padding), dilations=each(dilation), group=groups,
    )  # fmt: skip


@handles("linear")
def _linear(
    t: Translation, node: fx.Node, x: Value, weight: Value, bias: Value | None = None
) -> Value:
    if t.rank(node) == 2:
        inputs = (t.low(node, v) for v in (x, weight, bias) if v is not None)
        return t.w.op("Gemm", *inputs, transB=1)
    y = t.w.op("MatMul", t.low(node, x), t.w.op("Transpose", t.low(node, weight), perm=[1, 0]))
    return y if bias is None else t.w.op("Add", y, t.low(node, bias))


@handles("matmul", "bmm", "mm")
def _matmul(t: Translation, node: fx.Node, a: Value, b: Value) -> Value:
    return t.w.op("MatMul", t.low(node, a), t.low(node, b))


@handles("einsum")
def _einsum(
    t: Translation, node: fx.Node, equation: str, operands: Sequence[Value], **options: Any
) -> Value:
    return t.w.op("Einsum", *(t.low(node, v) for v in operands), equation=equation.replace(" ", ""))


@handles("addmm", "baddbmm")
def _addmm(
    t: Translation, node: fx.Node, c: Value, a: Value, b: Value, beta: float = 1, alpha: float = 1
) -> Value:
    y = t.w.op("MatMul", t.low(node, a), t.low(node, b))
    if alpha != 1:
        y = t.w.op("Mul", *t.same(y, float(alpha)))
    if beta == 0:
        return y
    c = t.low(node, c)
    return t.w.op("Add", y, c if beta == 1 else t.w.op("Mul", *t.same(c, float(beta))))


@handles("scaled_dot_product_attention")
def _attention(
    t: Translation, node: fx.Node, q: Value, k: Value, v: Value, mask: Value | None = None,
    dropout: float = 0.0, causal: bool = False, scale: float | None = None, **options: Any,
) -> Value:  # fmt: skip
    if options.get("enable_gqa"):
        raise UnsupportedNetwork("attention of grouped queries, which has no ONNX translation")
    rank, width = t.rank(node), input_of(node).meta["val"].shape[-1]
    axes = [*range(rank - 2), rank - 1, rank - 2]
    keys = t.w.op("Transpose", t.low(node, k), perm=axes)
    logits = t.w.op("MatMul", t.low(node, q), keys)
    factor = width**-0.5 if scale is None else float(scale)
    logits = t.w.op("Mul", *t.same(t.w.fp32(logits), factor))
    if causal:
        lengths = [int(input_of(node, i).meta["val"].shape[-2]) for i in (0, 1)]
        kept = torch.ones(*lengths, dtype=torch.bool).tril()
        mask = t.w.constant(f"causal_{lengths[0]}_{lengths[1]}", kept)
    if mask is not None and mask.dtype is torch.bool:
        logits = t.w.op("Where", mask, *t.same(logits, -math.inf), dtype=logits.dtype)
    elif mask is not None:
        logits = t.w.op("Add", logits, t.w.fp32(mask))
    weights = t.w.op("Softmax", logits, axis=rank - 1)
    return t.w.op("MatMul", t.low(node, weights), t.low(node, v))


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else _spread(list(value), 2)


@handles("avg_pool2d", "max_pool2d")
def _pool(
    t: Translation, node: fx.Node, x: Value, kernel: Any, stride: Any = None, padding: Any = 0,
    *rest: Any, **options: Any,
) -> Value:  # fmt: skip
    x = t.low(node, x)
    common: dict[str, Any] = {
        "kernel_shape": _pair(kernel), "pads": 2 * _pair(padding),
        "strides": _pair(stride if stride not in (None, []) else kernel),
    }  # fmt: skip
    if name_of(node) == "max_pool2d":
        ceil = bool(rest[1]) if len(rest) > 1 else options.get("ceil_mode", False)
        dilation = rest[0] if rest else options.get("dilation", 1)
        return t.w.op("MaxPool", x, dilations=_pair(dilation), ceil_mode=int(ceil), **common)
    ceil = bool(rest[0]) if rest else options.get("ceil_mode", False)
    counted = rest[1] if len(rest) > 1 else options.get("count_include_pad", True)
    if (rest[2] if len(rest) > 2 else options.get("divisor_override")) is not None:
        raise UnsupportedNetwork("a pool with a divisor, which has no ONNX translation")
    return t.w.op("AveragePool", x, count_include_pad=int(counted), ceil_mode=int(ceil), **common)


@handles("adaptive_avg_pool2d", "_adaptive_avg_pool2d")
def _adaptive(t: Translation, node: fx.Node, x: Value, size: Any) -> Value:
    before, after = input_of(node).meta["val"].shape[2:], t.shape(node)[2:]
    if any(n % m for n, m in zip(before, after, strict=True)):
        raise UnsupportedNetwork("an adaptive pool of unequal windows")
    window = [n // m for n, m in zip(before, after, strict=True)]
    return t.w.op("AveragePool", x, kernel_shape=window, strides=window)


@handles(
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_bilinear2d", "upsample_bicubic2d",
)  # fmt: skip
def _resize(t: Translation, node: fx.Node, x: Value, *rest: Any, **options: Any) -> Value:
    after, before = (n.meta["val"].shape[2:] for n in (node, input_of(node)))
    scales = t.w.floats(1.0, 1.0, *(_scale(n, m) for n, m in zip(after, before, strict=True)))
    settings: dict[str, Any]
    if (kind := _SMOOTH.get(name_of(node))) is not None:
        aligned = rest[1] if len(rest) > 1 else options.get("align_corners", False)
        wide, settings = t.w.fp32(x), {
            **kind,
            "coordinate_transformation_mode": "align_corners" if aligned else "half_pixel",
        }  # fmt: skip
    else:
        wide = t.w.fp32(x) if x.dtype is torch.bfloat16 else x
        settings = {
            "mode": "nearest", "nearest_mode": "floor",
            "coordinate_transformation_mode": "asymmetric",
        }  # fmt: skip
    return t.w.cast(t.w.op("Resize", wide, NOTHING, scales, **settings), x.dtype)


_SMOOTH: dict[str, dict[str, Any]] = {
    "upsample_bilinear2d": {"mode": "linear"},
    "upsample_bicubic2d": {"mode": "cubic", "cubic_coeff_a": -0.75},
}


def _scale(n: Any, m: Any) -> float:
    """Returns n / m for sizes of maps, which may be open, such that floor(m * scale) is n."""
    over, under = (v if isinstance(v, int) else v.node.expr for v in (n, m))
    try:
        scale = np.float32(float(over / under))
    except TypeError as error:
        raise UnsupportedNetwork("resizing to no fixed multiple of an open size") from error
    if isinstance(m, int) and np.floor(scale * np.float32(m)) < n:
        scale = np.nextafter(scale, np.float32(np.inf))
    return float(scale)


@handles("pad", "constant_pad_nd")
def _pad(
    t: Translation, node: fx.Node, x: Value, pads: Sequence[int], *rest: Any, **options: Any
) -> Value:
    given = options.get("mode", rest[0] if rest and isinstance(rest[0], str) else "constant")
    number = next((v for v in (*rest, options.get("value")) if isinstance(v, (int, float))), 0.0)
    mode = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    rank = t.rank(node)
    before, after = [0] * rank, [0] * rank
    for i in range(len(pads) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    value = t.w.cast(t.w.scalar(float(number)), x.dtype)
    return t.w.op("Pad", x, t.w.ints(*before, *after), value, mode=mode[given])


@handles("ncsn_fast.instance_norm_plus")
def _instance_norm_plus(
    t: Translation, node: fx.Node, x: Value, alpha: Value, gamma: Value, beta: Value, elu: bool,
    eps: float,
) -> Value:  # fmt: skip
    """IN++, with parameters (C,) or (N, C)."""
    w, channels = t.w, t.shape(node)[1]
    alpha, gamma, beta = (t.reshape(v, [-1, channels, 1, 1]) for v in (alpha, gamma, beta))
    x = w.fp32(x)
    mean = w.mean(x, 2, 3)
    centred = w.op("Sub", x, mean)
    variance = w.mean(w.op("Mul", centred, centred), 2, 3)
    scale = w.op("Div", gamma, w.rooted(variance, eps))
    apart = w.op("Sub", mean, w.mean(mean, 1))
    squares = w.total(w.op("Mul", apart, apart), 1)
    spread = w.op("Div", squares, w.scalar(float(max(channels - 1, 1))))
    shift = w.op("Mul", w.op("Div", apart, w.rooted(spread, eps)), w.op("Mul", gamma, alpha))
    y = w.op("Add", w.op("Mul", centred, scale), w.op("Add", shift, beta))
    return w.op("Elu", y, alpha=1.0) if elu else y

"""ATen operations on shapes, and reductions, in ONNX's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ncsn_fast.engines.lowering.graph import UnsupportedNetwork
from ncsn_fast.engines.onnx.translation import Translation, handles, input_of, name_of
from ncsn_fast.engines.onnx.writer import Value


@handles(
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_copy"
)
def _reshape(t: Translation, node: fx.Node, x: Value, *rest: Any) -> Value:
    shape = t.shape(node)
    if shape.count(-1) > 1:
        raise UnsupportedNetwork("a shape that has the number of images twice")
    return t.reshape(x, shape)


@handles("permute")
def _permute(t: Translation, node: fx.Node, x: Value, axes: Sequence[int]) -> Value:
    rank = t.rank(node)
    return t.w.op("Transpose", x, perm=[a % rank for a in axes])


@handles("transpose", "t", "swapaxes", "numpy_T")
def _transpose(t: Translation, node: fx.Node, x: Value, a: int = 0, b: int = 1) -> Value:
    rank = t.rank(node)
    axes = list(range(rank))
    axes[a % rank], axes[b % rank] = axes[b % rank], axes[a % rank]
    return t.w.op("Transpose", x, perm=axes)


@handles("mT", "adjoint", "matrix_H")
def _transposed_matrix(t: Translation, node: fx.Node, x: Value) -> Value:
    return _transpose(t, node, x, -1, -2)


@handles("expand", "expand_as")
def _expand(t: Translation, node: fx.Node, x: Value, *rest: Any) -> Value:
    shape = t.shape(node)
    before = [n if isinstance(n, int) else -1 for n in input_of(node).meta["val"].shape]
    if -1 in shape and -1 not in before:
        return t.w.op("Expand", x, t.sizes(shape))
    return t.w.op("Expand", x, t.w.ints(*(1 if n == -1 else n for n in shape)))


@handles("repeat")
def _repeat(t: Translation, node: fx.Node, x: Value, times: Sequence[int]) -> Value:
    if len(times) != input_of(node).meta["val"].ndim or any(n is None for n in times):
        raise UnsupportedNetwork("repeat with a new axis, which has no ONNX translation")
    return t.w.op("Tile", x, t.w.ints(*times))


@handles("cat", "concat")
def _cat(t: Translation, node: fx.Node, parts: Sequence[Value], axis: int = 0) -> Value:
    if t.exported.depends(node) == "map" and all(p.dtype.is_floating_point for p in parts):
        parts = [t.w.low(p) for p in parts]
    return t.w.op("Concat", *t.same(*parts), axis=axis % t.rank(node))


@handles("stack")
def _stack(t: Translation, node: fx.Node, parts: Sequence[Value], axis: int = 0) -> Value:
    axis %= t.rank(node)
    return t.w.op(
        "Concat", *(t.w.op("Unsqueeze", p, t.w.ints(axis)) for p in t.same(*parts)), axis=axis
    )


@handles("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "tensor_split")
def _split(t: Translation, node: fx.Node, x: Value, *rest: Any) -> list[Value]:
    values = node.meta["val"]
    axis = (rest[1] if len(rest) > 1 else node.kwargs.get("dim", 0)) % values[0].ndim
    return t.w.split(x, axis, [v.shape[axis] for v in values])


@handles("unbind")
def _unbind(t: Translation, node: fx.Node, x: Value, axis: int = 0) -> list[Value]:
    axis %= input_of(node).meta["val"].ndim
    n = input_of(node).meta["val"].shape[axis]
    return [t.w.op("Gather", x, t.w.index(i), axis=axis) for i in range(n)]


@handles("getitem")
def _getitem(t: Translation, node: fx.Node, parts: Sequence[Value], index: int) -> Value:
    return parts[index]


@handles("select")
def _select(t: Translation, node: fx.Node, x: Value, axis: int, index: int) -> Value:
    shape = input_of(node).meta["val"].shape
    axis %= len(shape)
    return t.w.op("Gather", x, t.w.index(index % shape[axis]), axis=axis)


@handles("slice")
def _slice(
    t: Translation, node: fx.Node, x: Value, axis: int = 0, start: Any = None, end: Any = None,
    step: int = 1,
) -> Value:  # fmt: skip
    shape = input_of(node).meta["val"].shape
    axis %= len(shape)
    if start in (None, 0) and step == 1 and (end is None or end >= 2**31):
        return x
    bounds = (t.w.ints(start or 0), t.w.ints(2**31 if end is None else end), t.w.ints(axis))
    return t.w.op("Slice", x, *bounds, t.w.ints(step))


@handles("index")
def _index(t: Translation, node: fx.Node, x: Value, indices: Sequence[Value | None]) -> Value:
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        raise UnsupportedNetwork("indexing by several tensors, which has no ONNX translation")
    ((axis, index),) = given
    return t.w.op("Gather", x, index, axis=axis)


@handles("embedding")
def _embedding(t: Translation, node: fx.Node, weight: Value, index: Value, *rest: Any) -> Value:
    return t.w.op("Gather", weight, index)


def _axes(node: fx.Node, axes: Any) -> list[int]:
    rank = input_of(node).meta["val"].ndim
    if axes is None or axes == []:
        return list(range(rank))
    return [a % rank for a in ([axes] if isinstance(axes, int) else axes)]


@handles("var")
def _var(
    t: Translation, node: fx.Node, x: Value, axes: Any = None, *rest: Any, **options: Any
) -> Value:
    axes = _axes(node, options.get("dim", axes))
    correction = options.get("correction", int(rest[0]) if rest else 1)
    keep = options.get("keepdim", rest[1] if len(rest) > 1 else False)
    x = t.w.fp32(x)
    centred = t.w.op("Sub", x, t.w.mean(x, *axes))
    squares = t.w.op("Mul", centred, centred)
    total = t.w.op("ReduceSum", squares, t.w.ints(*axes), keepdims=int(keep))
    size, correction = t.size(input_of(node), axes), 1 if correction is None else correction
    if size.constant is None:
        others = t.w.op("Sub", size, t.w.scalar(float(correction)))
    else:
        others = t.w.scalar(float(size.constant) - correction)
    return t.w.op("Div", total, others)


@handles("mean", "sum", "amax", "amin")
def _reduce(
    t: Translation, node: fx.Node, x: Value, axes: Any = None, keep: bool = False, **options: Any
) -> Value:
    kind = {"mean": "ReduceMean", "sum": "ReduceSum", "amax": "ReduceMax", "amin": "ReduceMin"}
    axes, keep = options.get("dim", axes), options.get("keepdim", keep)
    x = t.w.cast(x, torch.int64) if x.dtype is torch.bool else x
    x = t.w.fp32(x) if x.dtype.is_floating_point else x
    return t.w.op(kind[name_of(node)], x, t.w.ints(*_axes(node, axes)), keepdims=int(keep))


@handles("argmin", "argmax")
def _arg(t: Translation, node: fx.Node, x: Value, axis: int, keep: bool = False) -> Value:
    kind = {"argmin": "ArgMin", "argmax": "ArgMax"}[name_of(node)]
    (axis,) = _axes(node, axis)
    return t.w.op(kind, x, axis=axis, keepdims=int(keep), dtype=torch.int64)


@handles("softmax", "_softmax")
def _softmax(t: Translation, node: fx.Node, x: Value, axis: int, *rest: Any) -> Value:
    return t.w.op("Softmax", t.w.fp32(x), axis=axis % t.rank(node))

"""Handlers of products of maps, softmax, and the attention that they make up; see passes.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import fx

from ncsn_fast.engines.lowering.aten import Declined, Handlers, Lowering, Scaled, Value, is_rows
from ncsn_fast.engines.lowering.attention import is_read_as_tokens
from ncsn_fast.engines.lowering.graph import (
    AffineSpec,
    AttentionSpec,
    Map,
    ProductSpec,
    SoftmaxSpec,
    View,
)

HANDLERS = Handlers()
lowers = HANDLERS.lowers
aten = torch.ops.aten
_MOST_HEADS = 64  # each is a product of its own


@lowers(aten.scaled_dot_product_attention.default)
def _attention(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    if a.attn_mask is not None or a.dropout_p or a.is_causal or a.enable_gqa:
        raise Declined
    q, k, v = (_heads(low, low.view(x)) for x in (a.query, a.key, a.value))
    scale = 1 / math.sqrt(q.shape[2]) if a.scale is None else float(a.scale)
    heads, length, width = q.shape
    if k.shape[0] != heads or v.shape[0] != heads or k.shape[2] != width:
        raise Declined
    across = v.shape[2]
    y = Map(heads * across, *((q.map.height, q.map.width) if _fills(q) else (length, 1)))
    maps = (q.map, k.map, v.map)
    low.emit("attention", low.name(node, "attention"), maps, y, AttentionSpec(q, k, v, scale))
    return View(y, (heads, length, across), (across, heads * across, 1))


def _heads(low: Lowering, view: View) -> View:
    """Returns a view (heads, L, d) that is read as tokens; copies it if need be."""
    if len(view.shape) != 3:
        raise Declined
    if is_read_as_tokens(view):
        return view
    (heads, length, width), (head, row, step) = view.shape, view.strides
    tokens = View(view.map, (length, heads, width), (row, head, step), view.offset)
    copied = low.contiguous(tokens)
    return View(copied.map, view.shape, (width, heads * width, 1), copied.offset)


def _fills(view: View) -> bool:
    """Whether the tokens of a view are the pixels of its map."""
    return view.shape[1] == view.map.height * view.map.width


@lowers(aten.softmax.int, aten._softmax.default)
def _softmax(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    """Softmax of the last axis."""
    x, rank = low.view(node.args[0]), len(node.meta["val"].shape)
    if a.dim not in (-1, rank - 1) or node.meta["val"].dtype is not torch.float32:
        raise Declined
    x = x if is_rows(x) else low.contiguous(x)
    y = low.like(x)
    spec = SoftmaxSpec(math.prod(x.shape[:-1]), x.shape[-1])
    low.emit("softmax", low.name(node, "softmax"), (x.map,), y.map, spec)
    return y


@lowers(aten.matmul.default, aten.bmm.default)
def _matmul(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    first, second = (low.scaled(x) for x in node.args[:2])
    rank = len(first.view.shape)
    if rank != len(second.view.shape) or rank not in (2, 3):
        raise Declined
    heads = "h" * (rank - 2)
    return _product(low, node, (first, second), (f"{heads}lk", f"{heads}kn", f"{heads}ln"))


@lowers(aten.einsum.default)
def _einsum(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    """An einsum of two maps, whose first axis is N."""
    terms, arrow, result = a.equation.replace(" ", "").partition("->")
    parts = [*terms.split(","), result]
    plain = all(p.isalpha() and len({*p}) == len(p) for p in parts)
    if not arrow or len(parts) != 3 or not plain or len({p[0] for p in parts}) > 1:
        raise Declined
    operands = tuple(low.scaled(x) for x in a.tensors)
    if any(len(x.view.shape) != len(p) - 1 for x, p in zip(operands, parts, strict=False)):
        raise Declined
    return _product(low, node, operands, tuple(p[1:] for p in parts))


def _product(
    low: Lowering, node: fx.Node, operands: Sequence[Scaled], axes: Sequence[str]
) -> Value:
    """Lowers the sum over the axes that only the operands have; an axis is a letter.

    The rows of the product are those of the operand that is a softmax, else those that come first.
    """
    (x, y), (of_x, of_y, result) = (operand.view for operand in operands), axes
    scale = math.prod(operand.scale for operand in operands)
    if {*of_x} ^ {*of_y} != {*result} - ({*of_x} & {*of_y}):
        raise Declined
    if _is_softmax(low, y) or (not _is_softmax(low, x) and _is_before(of_y, of_x, result)):
        (x, y), (of_x, of_y) = (y, x), (of_y, of_x)
    heads = "".join(c for c in result if c in of_x and c in of_y)
    rows = "".join(c for c in result if c in of_x and c not in of_y)
    columns = "".join(c for c in result if c in of_y and c not in of_x)
    summed = "".join(c for c in of_x if c in of_y and c not in result)
    a, b = _merged(x, of_x, (heads, rows, summed)), _merged(y, of_y, (heads, summed, columns))
    sizes = dict(zip(of_x + of_y, x.shape + y.shape, strict=True))
    if a.shape[2] != b.shape[1] or a.shape[0] != b.shape[0]:
        raise Declined
    if not summed or a.shape[0] > _MOST_HEADS:
        raise Declined
    count, length, width = a.shape[0], a.shape[1], b.shape[2]
    # The heads of an attention's output are side by side in a token; others follow one another.
    beside = _is_softmax(low, x)
    near = next((v.map for v in (y, x) if v.map.height * v.map.width == length), None)
    size = (length, 1) if near is None else (near.height, near.width)
    m = Map(count * width, *size) if beside else Map(width, count, length)
    steps = (width, count * width, 1) if beside else (length * width, width, 1)
    target = View(m, (count, length, width), steps)
    low.emit("product", low.name(node, "product"), (x.map, y.map), m, ProductSpec(a, b, target))
    if scale != 1:
        scaled = Map(m.channels, m.height, m.width)
        low.emit("affine", low.name(node, "affine"), (m,), scaled, AffineSpec(scale))
        m = scaled
    strides: dict[str, int] = {}
    for letters, step in zip((heads, rows, columns), steps, strict=True):
        for letter in reversed(letters):
            strides[letter] = step
            step *= sizes[letter]
    return View(m, tuple(sizes[c] for c in result), tuple(strides[c] for c in result))


def _is_before(first: str, second: str, result: str) -> bool:
    """Whether the axes of one operand alone come before those of the other in a result."""
    own = [result.index(c) for c in first if c in result and c not in second]
    others = [result.index(c) for c in second if c in result and c not in first]
    return bool(own) and bool(others) and own[0] < others[0]


def _is_softmax(low: Lowering, view: View) -> bool:
    return any(op.kind == "softmax" and view.map in op.outputs for op in low.graph.ops)


def _merged(view: View, axes: str, groups: Sequence[str]) -> View:
    """Returns a view with an axis for each group of axes, in this order."""
    at = {axis: i for i, axis in enumerate(axes)}
    shape, strides = [], []
    for group in groups:
        own = [(view.shape[at[c]], view.strides[at[c]]) for c in group]
        size, step = 1, 0
        for length, stride in reversed([pair for pair in own if pair[0] != 1]):
            if size > 1 and stride != size * step:
                raise Declined
            step = stride if size == 1 else step
            size *= length
        shape.append(size)
        strides.append(step)
    return View(view.map, tuple(shape), tuple(strides), view.offset)

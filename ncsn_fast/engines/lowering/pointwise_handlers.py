"""Handlers of pointwise operations: activations, and sums and products with numbers and maps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from ncsn_fast.engines.lowering.aten import (
    Declined,
    Handlers,
    Lowering,
    Scaled,
    Value,
    image,
    is_image,
    is_whole,
)
from ncsn_fast.engines.lowering.graph import (
    ActivationSpec,
    AffineSpec,
    Factor,
    Vector,
    View,
)

HANDLERS = Handlers()
lowers = HANDLERS.lowers
aten = torch.ops.aten


def _activation(low: Lowering, node: fx.Node, kind: str, slope: float = 0.0) -> View:
    x = low.view(node.args[0])
    if not is_whole(x):
        x = low.contiguous(x)
    y = low.like(x)
    spec = ActivationSpec(slope) if kind == "leaky_relu" else None
    low.emit(kind, low.name(node, kind), (x.map,), y.map, spec)
    return y


@lowers(aten.silu.default, joins=True)
def _silu(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    return _activation(low, node, "silu")


@lowers(aten.relu.default, joins=True)
def _relu(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    return _activation(low, node, "relu")


@lowers(aten.tanh.default, joins=True)
def _tanh(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    return _activation(low, node, "tanh")


@lowers(aten.sigmoid.default, joins=True)
def _sigmoid(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    return _activation(low, node, "sigmoid")


@lowers(aten.elu.default, joins=True)
def _elu(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    if (a.alpha, a.scale, a.input_scale) != (1, 1, 1):
        raise Declined
    return _activation(low, node, "elu")


@lowers(aten.gelu.default, joins=True)
def _gelu(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    return _activation(low, node, "gelu_tanh" if a.approximate == "tanh" else "gelu")


@lowers(aten.leaky_relu.default, joins=True)
def _leaky_relu(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    return _activation(low, node, "leaky_relu", float(a.negative_slope))


def _factor(low: Lowering, x: View, node: Any) -> Factor:
    """Returns what a map is scaled or shifted by: a number, or one for each channel (and image)."""
    if isinstance(node, (int, float)):
        return float(node)
    if not isinstance(node, fx.Node):
        raise Declined
    value = node.meta["val"]
    constant = low.exported.depends(node) == "constant"
    if not isinstance(value, Tensor) or low.is_map(node):
        raise Declined
    rank = len(x.shape) + 1
    shape = (*(1,) * (rank - value.ndim), *value.shape)
    if len(shape) > rank:
        raise Declined
    channels = x.map.channels
    axes = [i for i, n in enumerate(x.shape, 1) if n == channels and x.strides[i - 1] == 1]
    wide = [i for i, n in enumerate(shape) if i and n != 1]
    if not is_whole(x) or (wide and wide != axes[:1]):
        raise Declined
    if constant and shape[0] == 1:
        tensor = low.tensor(node)
        assert tensor is not None
        if tensor.numel() == 1:
            low.exported.keep(node)  # the number is read here, and becomes part of operations
            return float(tensor)
        return tensor.reshape(-1).float()
    if low.exported.depends(node) != "condition" or low.exported.shape(node) is None:
        raise Declined
    if value.ndim != rank or not value.is_floating_point() or (not wide and channels != 1):
        raise Declined
    return low.vector(node, channels)


def _affine(
    low: Lowering, node: fx.Node, x: View, scale: Factor = 1.0, shift: Factor = 0.0
) -> View:
    if not is_whole(x):
        x = low.contiguous(x)
    y = low.like(x)
    low.emit("affine", low.name(node, "affine"), (x.map,), y.map, AffineSpec(scale, shift))
    return y


def _scaled(factor: Factor, by: float) -> Factor:
    if by == 1:
        return factor
    if isinstance(factor, Vector):
        raise Declined
    return factor * by


@lowers(aten.add.Tensor, aten.add.Scalar, joins=True)
def _add(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    return _sum(low, node, node.args[0], node.args[1], 1.0, float(a.alpha))


@lowers(aten.sub.Tensor, aten.sub.Scalar, joins=True)
def _sub(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    return _sum(low, node, node.args[0], node.args[1], 1.0, -float(a.alpha))


@lowers(aten.rsub.Tensor, aten.rsub.Scalar, joins=True)
def _rsub(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    return _sum(low, node, node.args[0], node.args[1], -float(a.alpha), 1.0)


@lowers(aten.neg.default, joins=True)
def _neg(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    return _affine(low, node, low.view(node.args[0]), -1.0)


def _sum(low: Lowering, node: fx.Node, a: Any, b: Any, scale_a: float, scale_b: float) -> Value:
    """Lowers scale_a a + scale_b b, where one of them may be no map."""
    if not low.is_map(a):
        a, b, scale_a, scale_b = b, a, scale_b, scale_a
    x = low.view(a)
    if not low.is_map(b):
        x = x if is_whole(x) else low.contiguous(x)
        return _affine(low, node, x, scale_a, _scaled(_factor(low, x, b), scale_b))
    y = low.view(b)
    if x.shape != y.shape:
        raise Declined
    x, y = _alike(low, x, y)
    for scale, view in ((scale_a, x), (scale_b, y)):
        if scale != 1:
            scaled = _affine(low, node, view, scale)
            x, y = (scaled, y) if view is x else (x, scaled)
    total = low.like(x)
    low.emit("add", low.name(node, "sum"), (x.map, y.map), total.map)
    return total


def _alike(low: Lowering, x: View, y: View) -> tuple[View, View]:
    """Returns two views of one shape so that both are in one order; copies where they are not."""

    def same() -> bool:
        strides = zip(x.shape, x.strides, y.strides, strict=True)
        sizes = [(v.map.channels, v.map.height, v.map.width) for v in (x, y)]
        return sizes[0] == sizes[1] and all(n == 1 or s == t for n, s, t in strides)

    if not (is_whole(x) and is_whole(y) and same()):
        if len(x.shape) == 3 and (is_image(x) or is_image(y)):
            x, y = image(low.image_map(x)), image(low.image_map(y))
        else:
            x, y = low.contiguous(x), low.contiguous(y)
    return x, y


@lowers(aten.mul.Tensor, aten.mul.Scalar, joins=True)
def _mul(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    x, factor = node.args[:2]
    if not low.is_map(x):
        x, factor = factor, x
    if (part := _part(low, x, factor)) is not None:
        return part
    view = low.view(x)
    view = view if is_whole(view) else low.contiguous(view)
    return _affine(low, node, view, _factor(low, view, factor))


def _part(low: Lowering, node: Any, factor: Any) -> Scaled | None:
    """Returns a part of a map times a number, not computed yet; None for other operands."""
    x = low.scaled(node)
    if is_whole(x.view) or not isinstance(factor, (int, float)):
        return None
    return Scaled(x.view, x.scale * factor)


@lowers(aten.div.Tensor, aten.div.Scalar, joins=True)
def _div(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    if not low.is_map(node.args[0]):
        raise Declined
    number = node.args[1]
    inverse = 1.0 / number if isinstance(number, (int, float)) and number else number
    if (part := _part(low, node.args[0], inverse)) is not None:
        return part
    view = low.view(node.args[0])
    view = view if is_whole(view) else low.contiguous(view)
    factor = _factor(low, view, node.args[1])
    if isinstance(factor, Vector):
        raise Declined
    return _affine(low, node, view, 1.0 / factor)

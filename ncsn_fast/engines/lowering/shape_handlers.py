"""Handlers of what changes shape, order or size: views, copies, concatenation, borders."""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from ncsn_fast.engines.lowering.aten import (
    Declined,
    Handlers,
    Lowering,
    Value,
    image,
    meta,
    raster,
    view_of,
)
from ncsn_fast.engines.lowering.graph import (
    Map,
    PadSpec,
    View,
)

HANDLERS = Handlers()
lowers = HANDLERS.lowers
aten = torch.ops.aten
_VIEWS = (
    aten.alias.default, aten.detach.default, aten.expand.default, aten.permute.default,
    aten.select.int, aten.slice.Tensor, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.t.default, aten.transpose.int, aten.unsqueeze.default, aten.movedim.int,
    aten.movedim.intlist, aten.swapaxes.default, aten.numpy_T.default, aten.narrow.default,
)  # fmt: skip
_SPLITS = (
    aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default,
    aten.unbind.int, aten.tensor_split.sections,
)  # fmt: skip
_RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.view_as.default, aten.reshape_as.default,
)  # fmt: skip


def _view(low: Lowering, tensor: Tensor, node: fx.Node) -> Any:
    """Runs a node that changes shape or order on a tensor without memory, its first argument."""

    def value(n: fx.Node) -> Any:
        if low.is_map(n):
            return tensor if n is node.args[0] else meta(low.view(n), low.exported.images)
        return low.exported.number(n) if low.exported.depends(n) == "batch" else low.constant(n)

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    assert callable(node.target)
    return node.target(*args, **kwargs)


@lowers(*_VIEWS, joins=True)
def _reorder(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    x, images = low.view(node.args[0]), low.exported.images
    return view_of(x.map, _view(low, meta(x, images), node), images)


@lowers(*_SPLITS, joins=True)
def _split(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    x, images = low.view(node.args[0]), low.exported.images
    parts = _view(low, meta(x, images), node)
    return tuple(view_of(x.map, part, images) for part in parts)


@lowers(operator.getitem, joins=True)
def _getitem(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    parts, index = node.args
    value = low.values.get(parts) if isinstance(parts, fx.Node) else None
    if not isinstance(value, tuple) or not isinstance(index, int):
        raise Declined
    return value[index]


@lowers(*_RESHAPES, joins=True)
def _reshape(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    x = low.view(node.args[0])
    images = low.exported.images
    before = meta(x, images)
    try:
        after = _view(low, before, node)
        if after.untyped_storage()._cdata == before.untyped_storage()._cdata:
            return view_of(x.map, after, images)  # else a reshape that has to copy
    except RuntimeError:  # a view that the layout does not allow
        pass
    x = low.contiguous(x, low.name(node, "copy"))
    return view_of(x.map, _view(low, meta(x, images), node), images)


@lowers(
    aten.clone.default, aten.contiguous.default, aten.dropout.default, aten.feature_dropout.default,
    aten.lift_fresh_copy.default, joins=True,
)  # fmt: skip
def _same(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    if getattr(a, "train", False):
        raise Declined
    return low.view(node.args[0])


@lowers(
    aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten._to_copy.default,
    aten.type_as.default, joins=True,
)  # fmt: skip
def _convert(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    """Conversions to the type that a value has; others are PyTorch's."""
    argument = node.args[0]
    if not isinstance(argument, fx.Node) or argument.meta["val"].dtype != node.meta["val"].dtype:
        raise Declined
    return low.view(argument)


@lowers(aten.cat.default, aten.concat.default)
def _concat(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    """Concatenates maps along channels."""
    dim = a.dim
    views = [low.view(x) for x in a.tensors]
    rank = len(views[0].shape)
    dim = dim - 1 if dim > 0 else dim + rank
    if rank == 3 and dim == 0:
        maps = [low.image_map(view) for view in views]
    elif dim == rank - 1:
        maps = [low.contiguous(view).map for view in views]
    else:
        raise Declined
    first = maps[0]
    if any((m.height, m.width) != (first.height, first.width) for m in maps):
        raise Declined
    y = Map(sum(m.channels for m in maps), first.height, first.width)
    low.emit("concat", low.name(node, "concat"), maps, y)
    if rank == 3 and dim == 0:
        return image(y)
    shape = (*views[0].shape[:-1], y.channels)
    return View(y, shape, raster(shape))


@lowers(aten.pad.default, aten.constant_pad_nd.default)
def _pad(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    """Zeros around an image."""
    if getattr(a, "mode", "constant") != "constant" or a.value not in (None, 0):
        raise Declined
    left, right, top, bottom, *rest = (*a.pad, 0, 0, 0, 0)[: max(4, len(a.pad))]
    if any(rest) or min(left, right, top, bottom) < 0:
        raise Declined
    x = low.image_map(low.view(node.args[0]))
    y = Map(x.channels, x.height + top + bottom, x.width + left + right)
    spec = PadSpec(left, right, top, bottom)
    return image(low.emit("pad", low.name(node, "pad"), (x,), y, spec))

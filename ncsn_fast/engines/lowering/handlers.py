"""Handlers of ATen operations: the table from what torch.export finds to operations of a graph."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from ncsn_fast.engines.lowering.aten import (
    Declined,
    Function,
    Handler,
    Lowering,
    Value,
    image,
    is_channels_first,
    is_image,
    is_whole,
    meta,
    raster,
    view_of,
)
from ncsn_fast.engines.lowering.graph import (
    ActivationSpec,
    AffineSpec,
    AttentionSpec,
    ConvolutionSpec,
    Factor,
    GroupNormSpec,
    Map,
    NormSpec,
    PadSpec,
    TransposedSpec,
    Vector,
    View,
)

HANDLERS: dict[Any, Handler] = {}

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


def lowers(*targets: Any, joins: bool = False) -> Callable[[Function], Function]:
    """Registers a handler of ATen operations.

    joins: whether the operation becomes part of what PyTorch runs, if it follows such a part.
    """

    def register(function: Function) -> Function:
        HANDLERS.update(dict.fromkeys(targets, Handler(function, joins)))
        return function

    return register


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


def _single(values: Any, default: int = 1) -> int:
    """Returns the number that all axes have in common."""
    found = {*values} if isinstance(values, (list, tuple)) else {values}
    if len(found) > 1 or not all(isinstance(n, int) for n in found):
        raise Declined
    return int(found.pop()) if found else default


def _weight(low: Lowering, node: Any) -> Tensor:
    weight = low.tensor(node)
    if weight is None or weight.dtype is not torch.float32:
        raise Declined
    return weight


@lowers(aten.conv2d.default, aten.conv2d.padding, aten.convolution.default)
def _convolution(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    weight = _weight(low, a.weight)
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise Declined
    stride, dilation = _single(a.stride), _single(a.dilation)
    if isinstance(a.padding, str):
        reach = dilation * (weight.shape[2] - 1)
        if a.padding == "same" and (reach % 2 or stride != 1):
            raise Declined
        padding = 0 if a.padding == "valid" else reach // 2
    else:
        padding = _single(a.padding)
    if getattr(a, "transposed", False):
        output_padding = _single(a.output_padding, 0)
        transposed = TransposedSpec(
            weight, low.tensor(a.bias), stride, padding, output_padding, a.groups, dilation
        )
        return _transposed(low, node, transposed)
    x = low.image_map(low.view(a.input))
    spec = ConvolutionSpec(
        weight, low.tensor(a.bias), padding, dilation, stride=stride, groups=a.groups
    )
    return image(low.graph.conv(low.owner(node, "conv"), x, spec))


@lowers(aten.conv_transpose2d.input)
def _convolution_transposed(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    numbers = map(_single, (a.stride, a.padding, a.output_padding))
    stride, padding, output_padding = numbers
    weight = _weight(low, a.weight)
    spec = TransposedSpec(
        weight, low.tensor(a.bias), stride, padding, output_padding, a.groups, _single(a.dilation)
    )
    return _transposed(low, node, spec)


def _transposed(low: Lowering, node: fx.Node, spec: TransposedSpec) -> View:
    if spec.weight.shape[2] != spec.weight.shape[3]:
        raise Declined
    x = low.image_map(low.view(node.args[0]))
    y = Map(spec.channels, spec.size(x.height), spec.size(x.width))
    return image(low.emit("conv_transpose", low.owner(node, "conv"), (x,), y, spec))


@lowers(aten.linear.default)
def _linear(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    """A linear layer of tokens (..., C): a 1x1 convolution of their map."""
    weight = _weight(low, a.weight)
    x = low.contiguous(low.view(a.input), low.name(node, "copy"))
    spec = ConvolutionSpec(weight[:, :, None, None], low.tensor(a.bias), padding=0)
    y = low.graph.conv(low.owner(node, "linear"), x.map, spec)
    shape = (*x.shape[:-1], y.channels)
    return View(y, shape, raster(shape))


@lowers(torch.ops.ncsn_fast.instance_norm_plus.default)
def _instance_norm_plus(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    x = low.view(a.x)
    if not is_channels_first(x):
        raise Declined
    three = (a.alpha, a.gamma, a.beta)
    if all(low.exported.depends(p) == "constant" for p in three):
        parameters = tuple(_weight(low, p) for p in three)
        spec = NormSpec(parameters, False, a.elu, eps=a.eps)
    elif (table := _level_table(low, three)) is not None:
        spec = NormSpec((table,), True, a.elu, eps=a.eps)
    else:
        vectors = tuple(low.vector(p, x.map.channels) for p in three)
        spec = NormSpec((), False, a.elu, eps=a.eps, vectors=vectors)
    return _normalised(low, node, x, "norm", spec)


def _node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


def _level_table(low: Lowering, three: tuple[fx.Node, ...]) -> Tensor | None:
    """Returns the table of gamma, alpha and beta, if they are the rows of one for a level."""
    parts = {p.args[0] for p in three if p.target is operator.getitem}
    if [p.args[1:] for p in three] != [(1,), (0,), (2,)] or len(parts) != 1:
        return None
    (split,) = parts
    embedding = split.args[0] if isinstance(split, fx.Node) else None
    if not isinstance(embedding, fx.Node) or embedding.target is not aten.embedding.default:
        return None
    table, level = embedding.args[:2]
    if level not in low.exported.inputs[1:2] or low.exported.depends(_node(table)) != "constant":
        return None
    return low.tensor(table)


def _normalised(low: Lowering, node: fx.Node, x: View, kind: str, spec: Any) -> View:
    y = low.like(x)
    low.emit(kind, low.owner(node, kind), (x.map,), y.map, spec)
    return y


@lowers(aten.instance_norm.default)
def _instance_norm(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    """IN++ with alpha 0."""
    x = low.view(a.input)
    if not is_channels_first(x) or not a.use_input_stats:
        raise Declined
    c = x.map.channels
    gamma, beta = low.tensor(a.weight), low.tensor(a.bias)
    gamma = torch.ones(c) if gamma is None else gamma
    beta = torch.zeros(c) if beta is None else beta
    return _normalised(
        low, node, x, "norm",
        NormSpec((torch.zeros(c), gamma, beta), False, False, eps=a.eps, plus=False),
    )  # fmt: skip


@lowers(aten.group_norm.default)
def _group_norm(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    x = low.view(a.input)
    if not is_channels_first(x):
        raise Declined
    spec = GroupNormSpec(a.num_groups, low.tensor(a.weight), low.tensor(a.bias), a.eps)
    return _normalised(low, node, x, "group_norm", spec)


@lowers(aten.layer_norm.default)
def _layer_norm(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    """A norm of each token (..., C)."""
    x = low.contiguous(low.view(a.input))
    if len(a.normalized_shape) != 1:
        raise Declined
    spec = GroupNormSpec(1, low.tensor(a.weight), low.tensor(a.bias), a.eps)
    return _normalised(low, node, x, "layer_norm", spec)


@lowers(aten.batch_norm.default)
def _batch_norm(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    return _folded_batch_norm(low, node, a, training=a.training)


@lowers(aten._native_batch_norm_legit_no_training.default)
def _native_batch_norm(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    return (_folded_batch_norm(low, node, a, training=False),)


def _folded_batch_norm(low: Lowering, node: fx.Node, a: SimpleNamespace, *, training: bool) -> View:
    x, mean, variance = low.view(a.input), low.tensor(a.running_mean), low.tensor(a.running_var)
    if training or mean is None or variance is None or not is_channels_first(x):
        raise Declined
    weight, bias = low.tensor(a.weight), low.tensor(a.bias)
    scale = torch.rsqrt(variance.double() + a.eps)
    scale = scale if weight is None else weight.double() * scale
    shift = -mean.double() * scale + (0 if bias is None else bias.double())
    y = low.like(x)
    spec = AffineSpec(scale.float(), shift.float())
    low.emit("affine", low.owner(node, "batch_norm"), (x.map,), y.map, spec)
    return y


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
    view = low.view(x)
    view = view if is_whole(view) else low.contiguous(view)
    return _affine(low, node, view, _factor(low, view, factor))


@lowers(aten.div.Tensor, aten.div.Scalar, joins=True)
def _div(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    if not low.is_map(node.args[0]):
        raise Declined
    view = low.view(node.args[0])
    view = view if is_whole(view) else low.contiguous(view)
    factor = _factor(low, view, node.args[1])
    if isinstance(factor, Vector):
        raise Declined
    return _affine(low, node, view, 1.0 / factor)


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


def _pair(values: Any) -> tuple[int, int]:
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    return (values[0], values[-1]) if values else (0, 0)


@lowers(aten.max_pool2d.default)
def _max_pool(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    stride = _pair(a.stride or a.kernel_size)
    settings = (_pair(a.kernel_size), stride, _pair(a.padding), _pair(a.dilation))
    if settings != ((5, 5), (1, 1), (2, 2), (1, 1)):
        raise Declined
    x = low.image_map(low.view(node.args[0]))
    return image(low.graph.unary("max_pool5", low.name(node, "pool"), x))


@lowers(aten.avg_pool2d.default)
def _avg_pool(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    kernel, padding = _pair(a.kernel_size), _pair(a.padding)
    stride = _pair(a.stride or a.kernel_size)
    view = low.view(node.args[0])
    if len(view.shape) != 3 or a.divisor_override is not None:
        raise Declined
    even = view.shape[1] % 2 == view.shape[2] % 2 == 0
    if (kernel, stride, padding) == ((5, 5), (1, 1), (2, 2)) and a.count_include_pad:
        kind = "avg_pool5"
    elif (kernel, stride, padding) == ((2, 2), (2, 2), (0, 0)) and even:
        kind = "mean_pool2"
    else:
        raise Declined
    return image(low.graph.unary(kind, low.name(node, "pool"), low.image_map(view)))


@lowers(aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default)
def _bilinear(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    if not a.align_corners:
        raise Declined
    return _resized(low, node, "resize")


@lowers(aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default)
def _nearest(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    x, shape = low.view(node.args[0]), low.exported.shape(node)
    if shape is None or shape[1:] not in (x.shape[1:], tuple(2 * n for n in x.shape[1:])):
        raise Declined
    return _resized(low, node, "nearest2")


def _resized(low: Lowering, node: fx.Node, kind: str) -> View:
    shape = low.exported.shape(node)
    if shape is None or len(shape) != 3:
        raise Declined
    x = low.image_map(low.view(node.args[0]))
    return image(low.emit(kind, low.name(node, "resize"), (x,), Map(*shape)))


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


@lowers(aten.scaled_dot_product_attention.default)
def _attention(low: Lowering, node: fx.Node, a: SimpleNamespace) -> Value:
    if a.attn_mask is not None or a.dropout_p or a.is_causal or a.enable_gqa:
        raise Declined
    q, k, v = (_heads(low, low.view(x)) for x in (a.query, a.key, a.value))
    heads, length, width = q.shape
    if q.shape[0] != k.shape[0] or v.shape[0] != heads:
        raise Declined
    scale = 1 / math.sqrt(width) if a.scale is None else float(a.scale)
    across = v.shape[2]
    y = Map(heads * across, *((q.map.height, q.map.width) if _fills(q) else (length, 1)))
    maps = (q.map, k.map, v.map)
    low.emit("attention", low.name(node, "attention"), maps, y, AttentionSpec(q, k, v, scale))
    return View(y, (heads, length, across), (across, heads * across, 1))


def _heads(low: Lowering, view: View) -> View:
    """Returns a view (heads, L, d) whose vectors are contiguous."""
    if len(view.shape) != 3:
        raise Declined
    return view if view.strides[2] == 1 or view.shape[2] == 1 else low.contiguous(view)


def _fills(view: View) -> bool:
    """Whether the tokens of a view are the pixels of its map."""
    return view.shape[1] == view.map.height * view.map.width

"""Handlers of layers: convolutions, norms, pools and resizing."""

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
    is_channels_first,
    raster,
)
from ncsn_fast.engines.lowering.graph import (
    AffineSpec,
    ConvolutionSpec,
    GroupNormSpec,
    Map,
    NormSpec,
    TransposedSpec,
    View,
)

HANDLERS = Handlers()
lowers = HANDLERS.lowers
aten = torch.ops.aten


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
    zeros = torch.zeros(c, dtype=torch.float32)
    gamma = torch.ones_like(zeros) if gamma is None else gamma
    beta = zeros if beta is None else beta
    return _normalised(
        low, node, x, "norm",
        NormSpec((zeros, gamma, beta), False, False, eps=a.eps, plus=False),
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

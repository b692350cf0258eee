"""Norms and activations in standard ONNX operators. Norms are float32, whatever the graph is."""

from __future__ import annotations

import torch
from torch import nn

from ncsn_fast.engines.onnx_writer import Value, Writer
from ncsn_fast.models import layers

EPS = 1e-5  # of all norms that do not say


def activate(w: Writer, style: layers.Style, x: Value) -> Value:
    """A key of layers.ACTIVATIONS."""
    if style.act_name == "swish":
        return swish(w, x)
    kind, alpha = {"elu": ("Elu", 1.0), "relu": ("Relu", None), "lrelu": ("LeakyRelu", 0.2)}[
        style.act_name
    ]
    return w.op(kind, x) if alpha is None else w.op(kind, x, alpha=alpha)


def swish(w: Writer, x: Value) -> Value:
    """x * sigmoid(x)."""
    return w.op("Mul", x, w.op("Sigmoid", x))


def normalise_act(
    w: Writer, style: layers.Style, norm: nn.Module, x: Value, level: Value | None
) -> Value:
    """The activation of a normalised map, in the graph's type."""
    y = normalise(w, norm, x, level)
    with w.inside(norm):
        return w.low(activate(w, style, y))


def normalise(w: Writer, norm: nn.Module, x: Value, level: Value | None) -> Value:
    """A norm of the published configurations, or a group norm; its result is float32."""
    x = w.fp32(x)
    with w.inside(norm):
        if isinstance(norm, layers.InstanceNormPlus):
            return _instance_norm_plus(w, norm, x, level)
        if isinstance(norm, nn.InstanceNorm2d):
            centred = w.op("Sub", x, w.mean(x, 2, 3))
            return w.op("Div", centred, w.rooted(_mean_square(w, centred, 2, 3), EPS))
        if isinstance(norm, nn.GroupNorm):
            return _group_norm(w, norm, x)
        if isinstance(norm, layers.VarianceNorm):
            return _variance_norm(w, norm, x)
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            statistics = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            inputs = (x, *(w.tensor(tensor) for tensor in statistics))
            return w.op("BatchNormalization", *inputs, epsilon=norm.eps)
    assert isinstance(norm, nn.Identity)
    return x


def _mean_square(w: Writer, x: Value, *axes: int) -> Value:
    return w.mean(w.op("Mul", x, x), *axes)


def _instance_norm_plus(
    w: Writer, norm: layers.InstanceNormPlus, x: Value, level: Value | None
) -> Value:
    """IN++ as an affine map of each channel: (x - mean) * A[n, c] + B[n, c].

    A = gamma / sqrt(var + eps), B = gamma * alpha * (mean - m) / sqrt(v + eps) + beta. Centred
    before it is scaled, as in the reference: x * A would cancel badly for a large mean.
    """
    if norm.conditional:
        assert level is not None
        channels = norm.embed.weight.shape[1] // 3
        rows = w.op("Gather", w.tensor(norm.embed.weight), level)
        rows = w.op("Reshape", rows, w.ints(-1, 3, channels, 1, 1))
        gamma, alpha, beta = (w.op("Gather", rows, w.index(i), axis=1) for i in range(3))
    else:
        channels = len(norm.alpha)
        alpha, gamma, beta = (_column(w, p) for p in (norm.alpha, norm.gamma, norm.beta))
    mean = w.mean(x, 2, 3)
    centred = w.op("Sub", x, mean)
    scale = w.op("Div", gamma, w.rooted(_mean_square(w, centred, 2, 3), EPS))
    apart = w.op("Sub", mean, w.mean(mean, 1))
    spread = w.op(
        "Div", w.total(w.op("Mul", apart, apart), 1), w.scalar(float(max(channels - 1, 1)))
    )
    shift = w.op("Mul", w.op("Div", apart, w.rooted(spread, EPS)), w.op("Mul", gamma, alpha))
    return w.op("Add", w.op("Mul", centred, scale), w.op("Add", shift, beta))


def _column(w: Writer, parameter: nn.Parameter) -> Value:
    """A parameter of channels (C,) as (C, 1, 1)."""
    return w.op("Reshape", w.tensor(parameter), w.ints(-1, 1, 1))


def _variance_norm(w: Writer, norm: layers.VarianceNorm, x: Value) -> Value:
    centred = w.op("Sub", x, w.mean(x, 2, 3))
    square = w.total(w.op("Mul", centred, centred), 2, 3)
    variance = w.op("Div", square, _others(w, x))
    return w.op("Mul", w.op("Div", x, w.rooted(variance, EPS)), _column(w, norm.alpha))


def _others(w: Writer, x: Value) -> Value:
    """Pixels of a map but one."""
    shape = w.shape(x)
    if shape is not None:
        return w.scalar(float(shape[1] * shape[2] - 1))
    size = w.op("Shape", x, dtype=torch.int64, start=2)
    return w.op("Sub", w.fp32(w.op("ReduceProd", size, keepdims=0)), w.scalar(1.0))


def _group_norm(w: Writer, norm: nn.GroupNorm, x: Value) -> Value:
    groups = w.op("Reshape", x, w.ints(0, norm.num_groups, -1))
    centred = w.op("Sub", groups, w.mean(groups, 2))
    y = w.op("Div", centred, w.rooted(_mean_square(w, centred, 2), norm.eps))
    y = w.op("Reshape", y, w.op("Shape", x, dtype=torch.int64))
    return w.op("Add", w.op("Mul", y, _column(w, norm.weight)), _column(w, norm.bias))

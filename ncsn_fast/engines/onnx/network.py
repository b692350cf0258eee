"""ONNX graphs of the networks, in standard operators.

Convolutions, pools, sums and activations between them use the graph's dtype. Norms, time embeddings
and bilinear resizing are always float32: sums of squares do not survive a mantissa of 8 bits, and
TensorRT neither resizes bfloat16 maps nor convolves them transposed, so in bfloat16 graphs
transposed convolutions are float32 too. So are image, time and output. Nothing depends on the
number or size of images, so either may be dynamic; if both are fixed, maps are resized to constant
sizes, and no node of a RefineNet computes with shapes, which runtimes do on the CPU. Two
rewritings, exact in real arithmetic: a 2x2 mean moves before a 1x1 convolution, and resizing to the
same size is dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ncsn_fast.engines.onnx.writer import NOTHING, Value, Writer
from ncsn_fast.models import layers, unet
from ncsn_fast.models.refinenet import RefineNet
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.models.unet import TimeUNet

EPS = 1e-5  # of all norms without one of their own


def write(
    model: ScoreModel, dtype: torch.dtype, shape: tuple[int, int, int] | None = None
) -> Writer:
    """Writes the graph of f: "x" (N, C, H, W) float32 and its noise level -> "f".

    The noise level is "level" int64, "sigma" float32 (N,), or nothing. shape is (N, H, W) if it is
    fixed.
    """
    w = Writer(model, dtype, shape)
    x = Value("x", torch.float32)
    with w.inside(model.net):
        if isinstance(model.net, TimeUNet):
            assert model.clock is not None
            f = _unet(w, model.net, x, _time(w, model.clock, Value("sigma", torch.float32)))
        else:
            assert isinstance(model.net, RefineNet)
            level = Value("level", torch.int64) if model.conditional else None
            f = _refinenet(w, model.net, x, level)
        w.op("Cast", f, name="f", to=torch.float32)
    return w


def _refinenet(w: Writer, net: RefineNet, x: Value, level: Value | None) -> Value:
    if net.scale_input:
        x = w.op("Sub", w.op("Mul", x, w.scalar(2.0)), w.scalar(1.0))
    h = _conv(w, net.begin_conv, w.low(x))
    skips: dict[str, Value] = {}
    for stage in net.arch.stages:
        for block in net.get_submodule(stage.name).children():
            assert isinstance(block, layers.ResidualBlock)
            h = _residual_block(w, block, h, level)
        skips[stage.name] = h
    refined: list[Value] = []
    for refine in net.arch.refines:
        module = net.get_submodule(refine.name)
        assert isinstance(module, layers.RefineBlock)
        refined = [_refine_block(w, module, [skips[refine.skip], *refined], level)]
    return _conv(w, net.end_conv, normalise_act(w, net.style, net.normalizer, refined[0], level))


def _residual_block(w: Writer, block: layers.ResidualBlock, x: Value, level: Value | None) -> Value:
    h = _conv(w, block.conv1, normalise_act(w, block.style, block.normalize1, x, level))
    h = _conv(w, block.conv2, normalise_act(w, block.style, block.normalize2, h, level))
    shortcut = x if block.shortcut is None else _conv(w, block.shortcut, x)
    with w.inside(block):
        return w.op("Add", h, shortcut)


def _residual_conv_unit(
    w: Writer, unit: layers.ResidualConvUnit, x: Value, level: Value | None
) -> Value:
    for block in range(unit.n_blocks):
        h = x
        for stage in range(unit.N_STAGES):
            name = f"{block + 1}_{stage + 1}"
            if unit.style.n_levels:
                h = normalise_act(w, unit.style, unit.get_submodule(f"{name}_norm"), h, level)
            else:
                with w.inside(unit):
                    h = activate(w, unit.style, h)
            h = _conv(w, unit.get_submodule(f"{name}_conv"), h)
        with w.inside(unit):
            x = w.op("Add", h, x)
    return x


def _chained_residual_pool(
    w: Writer, crp: layers.ChainedResidualPool, x: Value, level: Value | None
) -> Value:
    kind = "AveragePool" if level else "MaxPool"
    pool: dict[str, Any] = {"kernel_shape": (5, 5), "strides": (1, 1), "pads": (2, 2, 2, 2)}
    if level:
        pool["count_include_pad"] = 1
    with w.inside(crp):
        x = path = activate(w, crp.style, x)
        for stage, conv in enumerate(crp.convs):
            if level:
                path = w.low(normalise(w, crp.norms[stage], path, level))
            path = _conv(w, conv, w.op(kind, path, **pool))
            x = w.op("Add", x, path)
    return x


def _multi_scale_fusion(
    w: Writer, msf: layers.MultiScaleFusion, xs: list[Value], level: Value | None
) -> Value:
    maps, channels = [], 0
    for i, (x, conv) in enumerate(zip(xs, msf.convs, strict=True)):
        assert isinstance(conv, nn.Conv2d)
        maps.append(_conv(w, conv, w.low(normalise(w, msf.norms[i], x, level)) if level else x))
        channels = conv.out_channels
    total = maps[0]
    with w.inside(msf):
        for h in maps[1:]:
            total = w.op("Add", total, _resize(w, h, total, channels))
    return total


def _refine_block(
    w: Writer, block: layers.RefineBlock, xs: list[Value], level: Value | None
) -> Value:
    hs = []
    for unit, x in zip(block.adapt_convs, xs, strict=True):
        assert isinstance(unit, layers.ResidualConvUnit)
        hs.append(_residual_conv_unit(w, unit, x, level))
    h = _multi_scale_fusion(w, block.msf, hs, level) if len(hs) > 1 else hs[0]
    h = _chained_residual_pool(w, block.crp, h, level)
    return _residual_conv_unit(w, block.output_convs, h, level)


def _unet(w: Writer, net: TimeUNet, x: Value, t: Value) -> Value:
    embedding = swish(w, _embed(w, net.embed, t))
    h, skips = w.low(x), []
    for stage in unet.ENCODER:
        h = _unet_stage(w, net, stage, h, embedding)
        skips.append(h)
    skips.pop()
    for stage in unet.DECODER:
        h, skip = _unet_stage(w, net, stage, h, embedding), skips.pop()
        h = w.op("Add", h, skip) if net.adds_skips else w.op("Concat", h, skip, axis=1)
    return _conv(w, net.tconv1, h)


def _unet_stage(w: Writer, net: TimeUNet, stage: unet.Stage, x: Value, embedding: Value) -> Value:
    conv, dense, norm = map(net.get_submodule, (stage.conv, stage.dense, stage.norm))
    assert isinstance(dense, unet.Dense)
    h = w.fp32(_conv(w, conv, x))
    with w.inside(dense):
        bias = w.op("Unsqueeze", _linear(w, dense.dense, embedding), w.ints(2, 3))
        h = w.op("Add", h, bias)
    return w.low(swish(w, normalise(w, norm, h, None)))


def _time(w: Writer, clock: unet.Clock, sigma: Value) -> Value:
    """Writes Clock.time, min(1, log1p(y) / rate) with y = (sigma / scale)^2, to float32's accuracy.

    Below y = 1, log1p(y) = 2 artanh(y / (2 + y)): 1 + y would lose y's digits.
    """
    ratio = w.op("Mul", sigma, w.scalar(1 / clock.scale))
    y, two = w.op("Mul", ratio, ratio), w.scalar(2.0)
    small = w.op("Mul", w.op("Atanh", w.op("Div", y, w.op("Add", y, two))), two)
    large = w.op("Log", w.op("Add", y, w.scalar(1.0)))
    below = w.op("Less", y, w.scalar(1.0), dtype=torch.bool)
    log1p = w.op("Where", below, small, large, dtype=torch.float32)
    return w.op("Min", w.op("Mul", log1p, w.scalar(1 / clock.rate)), w.scalar(1.0))


def _embed(w: Writer, embed: nn.Module, t: Value) -> Value:
    """Writes a linear layer of [sin, cos] of 2 pi t W, multiplied in the network's order."""
    if isinstance(embed, nn.Sequential):
        features, linear = embed
        return _linear(w, linear, _embed(w, features, t))
    assert isinstance(embed, unet.FourierFeatures)
    with w.inside(embed):
        phase = w.op("Mul", w.op("Unsqueeze", t, w.ints(1)), w.tensor(embed.W))
        phase = w.op("Mul", w.op("Mul", phase, w.scalar(2.0)), w.scalar(torch.pi))
        return w.op("Concat", w.op("Sin", phase), w.op("Cos", phase), axis=1)


def _linear(w: Writer, linear: nn.Module, x: Value) -> Value:
    assert isinstance(linear, nn.Linear)
    with w.inside(linear):
        return w.op("Gemm", x, w.tensor(linear.weight), w.tensor(linear.bias), transB=1)


def _conv(w: Writer, module: nn.Module, x: Value) -> Value:
    """Writes a convolution: plain, transposed, or with a 2x2 mean."""
    if isinstance(module, layers.ConvMeanPool):
        if module.conv.kernel_size == (1, 1):  # the same after the mean, on a quarter of the pixels
            return _conv(w, module.conv, _mean_pool2(w, module, x))
        return _mean_pool2(w, module, _conv(w, module.conv, x))
    assert isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
    padding = module.padding
    assert isinstance(padding, tuple)
    transposed = isinstance(module, nn.ConvTranspose2d)
    dtype = torch.float32 if transposed and w.dtype is torch.bfloat16 else w.dtype
    parameters = [p for p in (module.weight, module.bias) if p is not None]
    settings: dict[str, Any] = {
        "kernel_shape": module.kernel_size,
        "strides": module.stride,
        "pads": (*padding, *padding),
        "dilations": module.dilation,
    }
    if transposed:
        settings["output_padding"] = module.output_padding
    with w.inside(module):
        inputs = (w.cast(x, dtype), *(w.tensor(parameter, dtype) for parameter in parameters))
        return w.op("ConvTranspose" if transposed else "Conv", *inputs, **settings)


def _mean_pool2(w: Writer, module: nn.Module, x: Value) -> Value:
    with w.inside(module):
        return w.op("AveragePool", x, halve=True, kernel_shape=(2, 2), strides=(2, 2))


def _resize(w: Writer, x: Value, like: Value, channels: int) -> Value:
    """Resizes x to the height and width of another map."""
    if x.halvings == like.halvings:
        return x
    shape = w.shape(like)
    if shape is not None:
        sizes = w.ints(shape[0], channels, *shape[1:])
    else:
        batch = w.op("Shape", x, dtype=torch.int64, end=2)
        sizes = w.op("Concat", batch, w.op("Shape", like, dtype=torch.int64, start=2), axis=0)
    y = w.op(
        "Resize", w.fp32(x), NOTHING, NOTHING, sizes,
        mode="linear", coordinate_transformation_mode="align_corners",
    )  # fmt: skip
    return w.low(Value(y.name, y.dtype, like.halvings))


def activate(w: Writer, style: layers.Style, x: Value) -> Value:
    """Writes the activation of a style, a key of layers.ACTIVATIONS."""
    if style.act_name == "swish":
        return swish(w, x)
    kind, alpha = {"elu": ("Elu", 1.0), "relu": ("Relu", None), "lrelu": ("LeakyRelu", 0.2)}[
        style.act_name
    ]
    return w.op(kind, x) if alpha is None else w.op(kind, x, alpha=alpha)


def swish(w: Writer, x: Value) -> Value:
    """Writes x * sigmoid(x)."""
    return w.op("Mul", x, w.op("Sigmoid", x))


def normalise_act(
    w: Writer, style: layers.Style, norm: nn.Module, x: Value, level: Value | None
) -> Value:
    """Writes a norm and its activation; the result has the graph's dtype."""
    y = normalise(w, norm, x, level)
    with w.inside(norm):
        return w.low(activate(w, style, y))


def normalise(w: Writer, norm: nn.Module, x: Value, level: Value | None) -> Value:
    """Writes a norm of the published configurations, or a group norm; the result is float32."""
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
    """Writes IN++ as an affine map of each channel: (x - mean) * A[n, c] + B[n, c].

    A = gamma / sqrt(var + eps), B = gamma * alpha * (mean - m) / sqrt(v + eps) + beta. x is centred
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
    """Reshapes a parameter of channels (C,) to (C, 1, 1)."""
    return w.op("Reshape", w.tensor(parameter), w.ints(-1, 1, 1))


def _variance_norm(w: Writer, norm: layers.VarianceNorm, x: Value) -> Value:
    centred = w.op("Sub", x, w.mean(x, 2, 3))
    square = w.total(w.op("Mul", centred, centred), 2, 3)
    variance = w.op("Div", square, _others(w, x))
    return w.op("Mul", w.op("Div", x, w.rooted(variance, EPS)), _column(w, norm.alpha))


def _others(w: Writer, x: Value) -> Value:
    """Writes the number of pixels of a map, minus one."""
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

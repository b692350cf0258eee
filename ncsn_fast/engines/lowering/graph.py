"""Lowered graph of an NCSN-family network: operations between feature maps, in order.

Lowering decides what is fused and what is computed in place; memory, dtypes and kernels are left to
the plans (engines/cpu/plan.py). Rewritings, exact in real arithmetic:

- a residual sum is a convolution that accumulates into its destination;
- a 3x3 convolution followed by a 2x2 mean is one 4x4 convolution with stride 2, which has 16 taps
  instead of 36; the 1x1 shortcut beside it runs after the mean, on a quarter of the pixels;
- the sum of a chained residual pool is computed as (x + path2) + path1, so that each sum is fused
  into an operation that writes or reads it anyway; resizing to the same size is dropped.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from ncsn_fast.models import layers
from ncsn_fast.models.refinenet import RefineNet

Kind = Literal[
    "conv", "norm", "elu", "add", "add_elu", "max_pool5", "avg_pool5", "mean_pool2", "resize_add",
    "pointwise",
]  # fmt: skip


@dataclasses.dataclass(eq=False)
class Map:
    """Feature maps (N, channels, height, width) that one operation writes; N is left open."""

    channels: int
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class ConvolutionSpec:
    """Parameters of a convolution: weight (C_out, C_in, k, k), and bias (C_out,) or None.

    Stride 1. If `pooled`, a 2x2 mean follows; both run as one convolution with k + 1 taps a side
    and stride 2.
    """

    weight: Tensor
    bias: Tensor | None = None
    padding: int = 1
    dilation: int = 1
    pooled: bool = False

    @property
    def stride(self) -> int:
        return 2 if self.pooled else 1

    @property
    def taps(self) -> int:
        return self.weight.shape[2] + self.pooled

    @property
    def channels(self) -> int:
        return self.weight.shape[0]

    def flop(self, y: Map) -> float:
        """Returns the FLOP for one image with output y; 2 per multiply-add."""
        return 2.0 * y.height * y.width * self.channels * self.weight.shape[1] * self.taps**2

    def kernel(self) -> Tensor:
        """Returns the weight that is run, (C_out, C_in, taps, taps)."""
        if not self.pooled:
            return self.weight.detach()
        w = self.weight.detach().double()
        corners = [(left, 1 - left, up, 1 - up) for up in (0, 1) for left in (0, 1)]
        shifted = torch.stack([nn.functional.pad(w, corner) for corner in corners])
        return shifted.mean(dim=0).to(self.weight.dtype)


@dataclasses.dataclass(frozen=True)
class NormSpec:
    """Parameters of IN++, with or without ELU.

    parameters: alpha, gamma and beta, (C,) each; if by_level, one table (levels, 3 C) of gamma,
    alpha and beta.   bias: biases (C,) that are added to the input first.
    """

    parameters: tuple[Tensor, ...]
    by_level: bool
    elu: bool
    bias: tuple[Tensor, ...] = ()


@dataclasses.dataclass(frozen=True)
class PointwiseSpec:
    """A pointwise pass: the sum of one to three maps and biases (C,), its ELU, or both in order."""

    total: bool
    elu: bool
    bias: tuple[Tensor, ...] = ()


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation of a graph.

    Attributes:
        overwrites: pairs (output, input): the output takes the memory of an input, which nothing
            may read afterwards. A convolution that overwrites accumulates into it.
        spec: parameters of a convolution, norm or pointwise pass.
    """

    kind: Kind
    name: str
    inputs: tuple[Map, ...]
    outputs: tuple[Map, ...]
    overwrites: tuple[tuple[Map, Map], ...] = ()
    spec: ConvolutionSpec | NormSpec | PointwiseSpec | None = None


class UnsupportedNetwork(ValueError):
    """Error of a network that lowering does not support; the message names the part."""


class Graph:
    """Operations in execution order, and the network's `input` and `output` maps."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        self.ops: list[Op] = []
        self.input = self.output = Map(channels, height, width)

    @property
    def flop(self) -> float:
        """FLOP of the convolutions, for one image."""
        return sum(
            op.spec.flop(op.outputs[0]) for op in self.ops if isinstance(op.spec, ConvolutionSpec)
        )

    def conv(self, name: str, x: Map, spec: ConvolutionSpec, *, into: Map | None = None) -> Map:
        """Appends a convolution of x, accumulated into `into` if given."""
        reach = spec.dilation * (spec.taps - 1) + 1 - 2 * spec.padding
        height, width = ((size - reach) // spec.stride + 1 for size in (x.height, x.width))
        y = Map(spec.channels, height, width)
        inputs = (x,) if into is None else (x, into)
        self.ops.append(Op("conv", name, inputs, (y,), () if into is None else ((y, into),), spec))
        return y

    def unary(
        self, kind: Kind, name: str, x: Map, *, in_place: bool = False, spec: NormSpec | None = None
    ) -> Map:
        """Appends an operation that keeps the size of x (halves it, for mean_pool2)."""
        shrink = 2 if kind == "mean_pool2" else 1
        y = Map(x.channels, x.height // shrink, x.width // shrink)
        self.ops.append(Op(kind, name, (x,), (y,), ((y, x),) if in_place else (), spec))
        return y

    def add(self, name: str, a: Map, b: Map) -> Map:
        """Appends a + b, in the memory of a."""
        y = dataclasses.replace(a)
        self.ops.append(Op("add", name, (a, b), (y,), ((y, a),)))
        return y

    def add_elu(self, name: str, a: Map, b: Map) -> tuple[Map, Map]:
        """Appends a + b in the memory of a, and its ELU in the memory of b."""
        total, y = dataclasses.replace(a), dataclasses.replace(b)
        self.ops.append(Op("add_elu", name, (a, b), (total, y), ((total, a), (y, b))))
        return total, y

    def resize_add(self, name: str, x: Map, a: Map) -> Map:
        """Appends a plus x resized to the size of a, in the memory of a."""
        y = dataclasses.replace(a)
        self.ops.append(Op("resize_add", name, (x, a), (y,), ((y, a),)))
        return y


def lower(net: nn.Module, height: int, width: int) -> Graph:
    """Lowers a RefineNet to a graph for images of this size.

    Raises:
        UnsupportedNetwork: its activation is not ELU, or its norm neither IN++ nor instance norm.
    """
    if not isinstance(net, RefineNet):
        raise UnsupportedNetwork("conditioning on time")
    style = net.style
    if style.act_name != "elu" or style.norm_name not in ("InstanceNorm++", "InstanceNorm"):
        raise UnsupportedNetwork(f"activation {style.act_name!r} with norm {style.norm_name!r}")
    graph = Graph(net.channels, height, width)
    h = graph.conv("begin_conv", graph.input, _conv(net.begin_conv))
    skips: dict[str, Map] = {}
    for stage in net.arch.stages:
        for i, block in enumerate(net.get_submodule(stage.name).children()):
            assert isinstance(block, layers.ResidualBlock)
            h = _residual_block(graph, f"{stage.name}.{i}", block, h)
        skips[stage.name] = h
    refined: list[Map] = []
    for refine in net.arch.refines:
        module = net.get_submodule(refine.name)
        assert isinstance(module, layers.RefineBlock)
        refined = [_refine_block(graph, refine.name, module, [skips[refine.skip], *refined])]
    h = _norm(graph, "normalizer", refined[0], net.normalizer, in_place=True)
    graph.output = graph.conv("end_conv", h, _conv(net.end_conv))
    return graph


def _conv(module: nn.Module, *, pooled: bool = False) -> ConvolutionSpec:
    assert isinstance(module, nn.Conv2d)
    padding = module.padding[0]
    assert isinstance(padding, int)
    return ConvolutionSpec(module.weight, module.bias, padding, module.dilation[0], pooled)


def _norm(
    graph: Graph, name: str, x: Map, norm: nn.Module, *, elu: bool = True, in_place: bool = False
) -> Map:
    if isinstance(norm, layers.InstanceNormPlus):
        by_level = norm.conditional
        spec = NormSpec(
            (norm.embed.weight,) if by_level else (norm.alpha, norm.gamma, norm.beta), by_level, elu
        )
    else:  # instance norm is IN++ with alpha 0, gamma 1, beta 0
        zeros = torch.zeros(x.channels)
        spec = NormSpec((zeros, torch.ones(x.channels), zeros), False, elu)
    return graph.unary("norm", name, x, in_place=in_place, spec=spec)


def _residual_block(graph: Graph, name: str, block: layers.ResidualBlock, x: Map) -> Map:
    h = _norm(graph, f"{name}.normalize1", x, block.normalize1)
    h = graph.conv(f"{name}.conv1", h, _conv(block.conv1))
    h = _norm(graph, f"{name}.normalize2", h, block.normalize2, in_place=True)
    conv2, shortcut = block.conv2, block.shortcut
    if isinstance(conv2, layers.ConvMeanPool):
        assert isinstance(shortcut, layers.ConvMeanPool)
        x = graph.unary("mean_pool2", f"{name}.shortcut.pool", x)
        x = graph.conv(f"{name}.shortcut.conv", x, _conv(shortcut.conv))
        return graph.conv(f"{name}.conv2", h, _conv(conv2.conv, pooled=True), into=x)
    if shortcut is not None:
        x = graph.conv(f"{name}.shortcut", x, _conv(shortcut))
    return graph.conv(f"{name}.conv2", h, _conv(conv2), into=x)


def _residual_conv_unit(
    graph: Graph, name: str, unit: layers.ResidualConvUnit, x: Map, path: Map | None = None
) -> Map:
    """Lowers the unit on x, or on x + path."""
    for block in range(unit.n_blocks):
        first, second = (f"{block + 1}_{stage + 1}" for stage in range(unit.N_STAGES))
        if unit.style.n_levels:
            x = x if path is None else graph.add(f"{name}.sum", x, path)
            h = _norm(graph, f"{name}.{first}_norm", x, unit.get_submodule(f"{first}_norm"))
        elif path is not None:
            x, h = graph.add_elu(f"{name}.elu", x, path)
        else:
            h = graph.unary("elu", f"{name}.elu", x)
        path = None
        h = graph.conv(f"{name}.{first}_conv", h, _conv(unit.get_submodule(f"{first}_conv")))
        if unit.style.n_levels:
            norm = unit.get_submodule(f"{second}_norm")
            h = _norm(graph, f"{name}.{second}_norm", h, norm, in_place=True)
        else:
            h = graph.unary("elu", f"{name}.elu", h, in_place=True)
        conv = _conv(unit.get_submodule(f"{second}_conv"))
        x = graph.conv(f"{name}.{second}_conv", h, conv, into=x)
    return x


def _chained_residual_pool(
    graph: Graph, name: str, crp: layers.ChainedResidualPool, x: Map
) -> tuple[Map, Map]:
    """Lowers the block; returns two maps whose sum is its output."""
    pool: Kind = "avg_pool5" if crp.style.n_levels else "max_pool5"

    def pooled(stage: int, path: Map) -> Map:
        if crp.style.n_levels:
            path = _norm(graph, f"{name}.norms.{stage}", path, crp.norms[stage], elu=False)
        return graph.unary(pool, f"{name}.pool", path)

    x = graph.unary("elu", f"{name}.elu", x, in_place=True)
    path = graph.conv(f"{name}.convs.0", pooled(0, x), _conv(crp.convs[0]))
    return graph.conv(f"{name}.convs.1", pooled(1, path), _conv(crp.convs[1]), into=x), path


def _multi_scale_fusion(
    graph: Graph, name: str, msf: layers.MultiScaleFusion, xs: list[Map]
) -> Map:
    total: Map | None = None
    for i, (x, conv) in enumerate(zip(xs, msf.convs, strict=True)):
        if msf.style.n_levels:
            x = _norm(graph, f"{name}.norms.{i}", x, msf.norms[i], elu=False, in_place=True)
        spec, label = _conv(conv), f"{name}.convs.{i}"
        if total is None or (x.height, x.width) == (total.height, total.width):
            total = graph.conv(label, x, spec, into=total)
        else:
            total = graph.resize_add(f"{name}.resize", graph.conv(label, x, spec), total)
    assert total is not None
    return total


def _refine_block(graph: Graph, name: str, block: layers.RefineBlock, xs: list[Map]) -> Map:
    hs = []
    for i, (unit, x) in enumerate(zip(block.adapt_convs, xs, strict=True)):
        assert isinstance(unit, layers.ResidualConvUnit)
        hs.append(_residual_conv_unit(graph, f"{name}.adapt_convs.{i}", unit, x))
    h = _multi_scale_fusion(graph, f"{name}.msf", block.msf, hs) if len(hs) > 1 else hs[0]
    h, path = _chained_residual_pool(graph, f"{name}.crp", block.crp, h)
    return _residual_conv_unit(graph, f"{name}.output_convs", block.output_convs, h, path)

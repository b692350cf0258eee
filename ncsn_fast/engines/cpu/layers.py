"""Operations that plans have several algorithms for, by what decides which is the fastest."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from ncsn_fast.engines.lowering.graph import (
    AttentionSpec,
    ConvolutionSpec,
    Graph,
    Map,
    NormSpec,
    Op,
    View,
)
from ncsn_fast.ops.cpu import winograd_pays
from ncsn_fast.ops.tiles import TAPS

_TILE_CHANNELS = 16
_PIXELS = 1024  # of the maps that a layer is timed with, about


@dataclasses.dataclass(frozen=True)
class Layer:
    """Shape of a 3x3 convolution: oneDNN's direct algorithm, or our Winograd."""

    kind: ClassVar[str] = ""
    inputs: int
    outputs: int
    height: int
    width: int
    dilation: int

    @property
    def batch(self) -> int:
        """Images to time it with: enough pixels to keep the threads busy, and no more."""
        return _batch(self.height * self.width)

    def graph(self) -> Graph:
        """Returns a network of the layer alone."""
        weight = _numbers(self.outputs, self.inputs, 3, 3)
        spec = ConvolutionSpec(weight, padding=self.dilation, dilation=self.dilation)
        return _alone(spec, self.height, self.width)


@dataclasses.dataclass(frozen=True)
class Pointwise:
    """Shape of a 1x1 convolution: oneDNN's convolution, or a matrix product."""

    kind: ClassVar[str] = "pointwise "
    inputs: int
    outputs: int
    height: int
    width: int

    @property
    def batch(self) -> int:
        """Images to time it with."""
        return _batch(self.height * self.width)

    def graph(self) -> Graph:
        """Returns a network of the layer alone."""
        weight = _numbers(self.outputs, self.inputs, 1, 1)
        return _alone(
            ConvolutionSpec(weight, _numbers(self.outputs), padding=0), self.height, self.width
        )


@dataclasses.dataclass(frozen=True)
class Attention:
    """Shape of an attention: our fused kernel in float32, or matrix products in the maps' type."""

    kind: ClassVar[str] = "attention "
    heads: int
    length: int
    width: int
    value_width: int

    @property
    def batch(self) -> int:
        """Images to time it with."""
        return _batch(self.length)

    def graph(self) -> Graph:
        """Returns a network of the layer alone."""
        parts = (self.width, self.width, self.value_width)
        row = self.heads * sum(parts)
        graph = Graph(row, self.length, 1)

        def part(i: int) -> View:
            shape, offset = (self.heads, self.length, parts[i]), self.heads * sum(parts[:i])
            return View(graph.input, shape, (parts[i], row, 1), offset)

        spec = AttentionSpec(part(0), part(1), part(2), 1 / math.sqrt(self.width))
        y = Map(self.heads * self.value_width, self.length, 1)
        graph.ops.append(Op("attention", "layer", (graph.input,) * 3, (y,), spec=spec))
        graph.output = y
        return graph


@dataclasses.dataclass(frozen=True)
class TileLayer:
    """Shape of a convolution that keeps the size: oneDNN's, or ours in the tiles of AMX.

    normed: whether a norm reads its sum, whose statistics a convolution in tiles computes.
    """

    kind: ClassVar[str] = "tiles "
    inputs: int
    outputs: int
    height: int
    width: int
    taps: int
    dilation: int
    normed: bool = False

    @property
    def batch(self) -> int:
        """Images to time it with."""
        return _batch(self.height * self.width)

    def graph(self) -> Graph:
        """Returns a network of the layer with what it saves: padding, and a norm's statistics.

        An activation before it pads its input.
        """
        weight = _numbers(self.outputs, self.inputs, self.taps, self.taps)
        padding = self.dilation * (self.taps // 2)
        graph = Graph(self.inputs, self.height, self.width)
        x = graph.unary("elu", "before", graph.input)
        spec = ConvolutionSpec(weight, padding=padding, dilation=self.dilation)
        graph.output = y = graph.conv("layer", x, spec)
        if self.normed:
            rows = tuple(torch.ones(self.outputs) for _ in range(3))
            graph.output = graph.unary("norm", "after", y, spec=NormSpec(rows, False, elu=True))
        return graph


AnyLayer = Layer | Pointwise | Attention | TileLayer


def _alone(spec: ConvolutionSpec, height: int, width: int) -> Graph:
    """Returns a network of one convolution."""
    graph = Graph(spec.weight.shape[1], height, width)
    graph.output = graph.conv("layer", graph.input, spec)
    return graph


def layer_of(op: Op) -> AnyLayer | None:
    """Returns the layer that an operation is, if there are two algorithms for it."""
    spec, x = op.spec, op.inputs[0]
    if isinstance(spec, ConvolutionSpec) and can_be_winograd(op, spec):
        return Layer(x.channels, spec.channels, x.height, x.width, spec.dilation)
    if isinstance(spec, ConvolutionSpec) and can_be_product(op, spec):
        return Pointwise(x.channels, spec.channels, x.height, x.width)
    if isinstance(spec, AttentionSpec) and spec.query.shape == spec.key.shape:
        heads, length, width = spec.query.shape
        return Attention(heads, length, width, spec.value.shape[2])
    return None


def tile_layer_of(op: Op, *, normed: bool = False) -> TileLayer | None:
    """Returns the layer that an operation is, if it can run in tiles."""
    spec, x = op.spec, op.inputs[0]
    if not isinstance(spec, ConvolutionSpec) or not can_be_tiles(op, spec):
        return None
    sizes = (x.channels, spec.channels, x.height, x.width)
    return TileLayer(*sizes, spec.taps, spec.dilation, normed)


def can_be_tiles(op: Op, spec: ConvolutionSpec) -> bool:
    """Whether the convolution in tiles covers a convolution, and its channels fill them halfway."""
    keeps = spec.stride == spec.groups == 1 and spec.padding == spec.dilation * (spec.taps // 2)
    fills = min(op.inputs[0].channels, spec.channels) >= _TILE_CHANNELS
    return keeps and fills and spec.taps in TAPS


def can_be_winograd(op: Op, spec: ConvolutionSpec) -> bool:
    """Whether Winograd's algorithm covers a convolution, and its tiles fit the map."""
    x, plain = op.inputs[0], spec.stride == spec.groups == 1
    fits = plain and spec.taps == 3 and spec.padding == spec.dilation
    return fits and winograd_pays(x.channels, spec.channels, x.height, x.width, spec.dilation)


def can_be_product(op: Op, spec: ConvolutionSpec) -> bool:
    """Whether a convolution is one matrix product, which adds a bias or to a map, but not both."""
    plain = spec.taps == spec.stride == spec.groups == 1 and spec.padding == 0
    return plain and (spec.bias is None or not op.overwrites)


def _batch(pixels: int) -> int:
    return max(1, min(16, _PIXELS // pixels))


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))

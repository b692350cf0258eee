"""Lowered graph of a network: operations between feature maps, in order.

`lower` (lower.py) makes it. Memory, dtypes and kernels are left to the plans of the engines
(engines/cpu/plan.py, engines/cuda/plan.py).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Activations that are operations of their own, and end fused ones. A leaky ReLU has a slope.
ACTIVATIONS = ("elu", "silu", "relu", "gelu", "gelu_tanh", "tanh", "sigmoid", "leaky_relu")


@dataclasses.dataclass(eq=False)
class Map:
    """Feature maps (N, channels, height, width) that one operation writes; N is left open."""

    channels: int
    height: int
    width: int

    @property
    def numel(self) -> int:
        """Elements for one image."""
        return self.channels * self.height * self.width

    def elements(self, batch: int) -> int:
        """Returns the elements of the map's memory."""
        return batch * self.numel


@dataclasses.dataclass(frozen=True)
class Slice:
    """Some channels of a map, from `first`, in whose memory another map lies."""

    whole: Map
    first: int


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor (N, *shape) in the memory of a map: strides and offset in elements, for one image.

    The memory of a map is channels-last: (height, width, channels), one image after another.
    """

    map: Map
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0


@dataclasses.dataclass(eq=False)
class Vector:
    """Numbers (N, channels) in float32 that depend on the network's conditions only."""

    channels: int
    value: Any  # the node of the exported network that computes them


# What an affine map multiplies by or adds: one number, one for each channel, or (N, C) of them.
Factor = float | Tensor | Vector


@dataclasses.dataclass(frozen=True)
class ConvolutionSpec:
    """Parameters of a convolution: weight (C_out, C_in / groups, k, k), and bias (C_out,) or None.

    If `pooled`, the stride is 2 and a 2x2 mean of the convolution with stride 1 is computed, as one
    convolution with k + 1 taps a side.   activation: of the sum, which is computed with it; only
    plans for the CPU write it (engines/cpu/epilogues.py).
    """

    weight: Tensor
    bias: Tensor | None = None
    padding: int = 1
    dilation: int = 1
    pooled: bool = False
    stride: int = 1
    groups: int = 1
    activation: str = ""

    @property
    def taps(self) -> int:
        return self.weight.shape[2] + self.pooled

    @property
    def channels(self) -> int:
        return self.weight.shape[0]

    def size(self, length: int) -> int:
        """Returns the height or width of the output for that of the input."""
        reach = self.dilation * (self.taps - 1) + 1 - 2 * self.padding
        return (length - reach) // self.stride + 1

    def flop(self, y: Map) -> float:
        """Returns the FLOP for one image with output y; 2 per multiply-add."""
        return 2.0 * y.height * y.width * self.channels * self.weight.shape[1] * self.taps**2

    def kernel(self) -> Tensor:
        """Returns the weight that is run, (C_out, C_in / groups, taps, taps)."""
        if not self.pooled:
            return self.weight.detach()
        w = self.weight.detach().double()
        corners = [(left, 1 - left, up, 1 - up) for up in (0, 1) for left in (0, 1)]
        shifted = torch.stack([nn.functional.pad(w, corner) for corner in corners])
        return shifted.mean(dim=0).to(self.weight.dtype)


@dataclasses.dataclass(frozen=True)
class TransposedSpec:
    """Parameters of a transposed convolution: weight (C_in, C_out / groups, k, k) and bias."""

    weight: Tensor
    bias: Tensor | None
    stride: int = 1
    padding: int = 0
    output_padding: int = 0
    groups: int = 1
    dilation: int = 1

    @property
    def channels(self) -> int:
        return self.weight.shape[1] * self.groups

    def size(self, length: int) -> int:
        """Returns the height or width of the output for that of the input."""
        reach = self.dilation * (self.weight.shape[2] - 1) + 1
        return (length - 1) * self.stride - 2 * self.padding + reach + self.output_padding

    def flop(self, x: Map) -> float:
        """Returns the FLOP for one image with input x; 2 per multiply-add."""
        return 2.0 * x.numel * self.weight[0].numel()


@dataclasses.dataclass(frozen=True)
class SquaresSpec:
    """Squares of factor x factor pixels from groups of channels.

    The first `first` rows and columns are left out.
    """

    factor: int
    first: int = 0


@dataclasses.dataclass(frozen=True)
class NormSpec:
    """Parameters of IN++, with or without ELU.

    parameters: alpha, gamma and beta, (C,) each; if by_level, one table (levels, 3 C) of gamma,
    alpha and beta.   bias: biases (C,) that are added to the input first.   vectors: alpha, gamma
    and beta of each image, in place of `parameters`.   plus: False for an instance norm, which is
    IN++ with alpha 0.
    """

    parameters: tuple[Tensor, ...]
    by_level: bool
    elu: bool
    bias: tuple[Tensor, ...] = ()
    eps: float = 1e-5
    vectors: tuple[Vector, ...] = ()
    plus: bool = True


@dataclasses.dataclass(frozen=True)
class GroupNormSpec:
    """Parameters of a group norm of x + add, modulated, and its activation.

    y = activation(modulated), modulated = (weight norm + bias) * scale + shift, each of the last
    two (N, C), or None.   biases: (C,), that are added to x first, once more (fusion.py).
    """

    groups: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    activation: str = ""
    add: Vector | None = None
    scale: Vector | None = None
    shift: Vector | None = None
    biases: tuple[Tensor, ...] = ()


@dataclasses.dataclass(frozen=True)
class PointwiseSpec:
    """A pointwise pass: a sum of one to three maps and biases (C,), its activation, or both.

    weights: of the maps; all 1 if there are none.
    """

    total: bool
    activation: str = ""
    bias: tuple[Tensor, ...] = ()
    weights: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class AffineSpec:
    """activation(scale * (x + biases) + shift); biases (C,) are those of fusion.py."""

    scale: Factor = 1.0
    shift: Factor = 0.0
    activation: str = ""
    biases: tuple[Tensor, ...] = ()

    @property
    def only_scales(self) -> bool:
        return isinstance(self.shift, float) and self.shift == 0.0 and not self.activation

    @property
    def only_shifts(self) -> bool:
        return isinstance(self.scale, float) and self.scale == 1.0 and not self.activation

    @property
    def number(self) -> float | None:
        """The number that all of x is multiplied by; None if that is not all."""
        return self.scale if isinstance(self.scale, float) and self.only_scales else None

    @property
    def is_constant(self) -> bool:
        """Whether it is linear, and nothing depends on the network's conditions."""
        if self.activation:
            return False
        return not isinstance(self.scale, Vector) and not isinstance(self.shift, Vector)


@dataclasses.dataclass(frozen=True)
class AddSpec:
    """Weights of a sum: a * first + b * second."""

    a: float = 1.0
    b: float = 1.0


@dataclasses.dataclass(frozen=True)
class ActivationSpec:
    """The slope of a leaky ReLU."""

    slope: float = 0.0


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """softmax(scale q k^T) v of (N, heads, L, d); q, k and v are views of the inputs' memory."""

    query: View
    key: View
    value: View
    scale: float

    @property
    def heads(self) -> int:
        return self.query.shape[0]

    def flop(self) -> float:
        """Returns the FLOP for one image; 2 per multiply-add."""
        heads, length, width = self.query.shape
        return 2.0 * heads * length * self.key.shape[1] * (width + self.value.shape[2])


@dataclasses.dataclass(frozen=True)
class ProductSpec:
    """y = a b of (heads, L, K) and (heads, K, M): views of the maps that are read and written."""

    a: View
    b: View
    y: View

    def flop(self) -> float:
        """Returns the FLOP for one image; 2 per multiply-add."""
        return 2.0 * math.prod(self.a.shape) * self.b.shape[2]


@dataclasses.dataclass(frozen=True)
class SoftmaxSpec:
    """Softmax of scale * x, whose memory is `rows` rows of `columns` for an image."""

    rows: int
    columns: int
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class PadSpec:
    """Rows and columns of zeros around an image."""

    left: int
    right: int
    top: int
    bottom: int


@dataclasses.dataclass(frozen=True)
class CopySpec:
    """target = source, views of the same shape in the memory of the input and of the output."""

    source: View
    target: View


@dataclasses.dataclass(frozen=True)
class TorchSpec:
    """Nodes of the exported network that PyTorch runs, in float32, as one operation.

    program: a torch.fx graph module, called with N, the inputs, `vectors` and the named parameters;
        returns the outputs as a tuple.
    inputs, outputs: views, of shapes that the program takes and returns.
    """

    program: Any
    inputs: tuple[View, ...]
    outputs: tuple[View, ...]
    parameters: tuple[str, ...]
    vectors: tuple[Vector, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()  # of the vectors, for one image


Spec = (
    ConvolutionSpec
    | TransposedSpec
    | SquaresSpec
    | NormSpec
    | GroupNormSpec
    | PointwiseSpec
    | AffineSpec
    | AddSpec
    | ActivationSpec
    | AttentionSpec
    | ProductSpec
    | SoftmaxSpec
    | PadSpec
    | CopySpec
    | TorchSpec
)


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation of a graph.

    Attributes:
        kind: "conv", which adds to its second input if it has one; "conv_transpose";
            "depth_to_space"; "norm" (IN++); "group_norm"; "layer_norm" (a group norm of each
            pixel); an activation; "add", and "add_" + an activation, whose outputs are the sum and
            its activation, or only the latter; "affine"; "concat"; "max_pool5", "avg_pool5",
            "mean_pool2"; "nearest2"; "resize", "resize_add" (bilinear, with align_corners); "pad";
            "attention"; "product"; "softmax"; "copy"; "pointwise" (fusion.py); "torch".
        overwrites: pairs (output, input): the output takes the memory of an input, which nothing
            may read afterwards. A convolution that overwrites accumulates into it.
        spec: parameters.
    """

    kind: str
    name: str
    inputs: tuple[Map, ...]
    outputs: tuple[Map, ...]
    overwrites: tuple[tuple[Map, Map], ...] = ()
    spec: Spec | None = None

    @property
    def flop(self) -> float:
        """FLOP of convolutions, products and attention, for one image; 0 for what memory bounds."""
        spec = self.spec
        if isinstance(spec, ConvolutionSpec):
            return spec.flop(self.outputs[0])
        if isinstance(spec, TransposedSpec):
            return spec.flop(self.inputs[0])
        return spec.flop() if isinstance(spec, (AttentionSpec, ProductSpec)) else 0.0


class UnsupportedNetwork(ValueError):
    """Error of a network that lowering does not support; the message names the part."""


class Graph:
    """Operations in execution order, and the network's `input` and `output` maps.

    Attributes:
        scale, shift: the input map holds scale * x + shift.
        batch: the one batch size that the network can run with; None for all.
        condition: computes `vectors` from the conditions; see TorchSpec.program.
        parameters: tensors that programs read, by name.
        slices: maps that lie in others; what writes them skips the other channels
            (concatenation.py).
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        self.ops: list[Op] = []
        self.input = self.output = Map(channels, height, width)
        self.scale, self.shift = 1.0, 0.0
        self.batch: int | None = None
        self.condition: Any = None
        self.vectors: tuple[Vector, ...] = ()
        self.condition_parameters: tuple[str, ...] = ()
        self.parameters: dict[str, Tensor] = {}
        self.kept: frozenset[str] = frozenset()
        self.slices: Mapping[Map, Slice] = {}

    @property
    def flop(self) -> float:
        """FLOP of convolutions and attention, for one image."""
        return sum(op.flop for op in self.ops)

    def without_weights(self) -> Graph:
        """Copies the graph with storage-free tensors, but for `parameters`."""
        other = copy.copy(self)
        other.ops = [dataclasses.replace(op, spec=_without_weights(op.spec)) for op in self.ops]
        return other

    def conv(self, name: str, x: Map, spec: ConvolutionSpec, *, into: Map | None = None) -> Map:
        """Appends a convolution of x, accumulated into `into` if given."""
        y = Map(spec.channels, spec.size(x.height), spec.size(x.width))
        inputs = (x,) if into is None else (x, into)
        self.ops.append(Op("conv", name, inputs, (y,), () if into is None else ((y, into),), spec))
        return y

    def unary(
        self, kind: str, name: str, x: Map, *, in_place: bool = False, spec: Spec | None = None
    ) -> Map:
        """Appends an operation that keeps the size of x (halves it, for mean_pool2)."""
        shrink = 2 if kind == "mean_pool2" else 1
        y = Map(x.channels, x.height // shrink, x.width // shrink)
        self.ops.append(Op(kind, name, (x,), (y,), ((y, x),) if in_place else (), spec))
        return y


def _without_weights(spec: Any) -> Any:
    """Copies an operation's parameters with storage-free tensors."""
    if not dataclasses.is_dataclass(spec) or isinstance(spec, type):
        return spec

    def bare(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.zeros((), dtype=value.dtype).expand(value.shape)
        return tuple(map(bare, value)) if isinstance(value, tuple) else value

    fields = {f.name: bare(getattr(spec, f.name)) for f in dataclasses.fields(spec)}
    return dataclasses.replace(spec, **fields)

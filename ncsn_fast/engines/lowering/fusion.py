"""Fusion for the GPU: one pointwise pass between two convolutions.

cuDNN's convolutions only write their output, so the biases, weights, residual sums and activations
of the lowered graph move into the pass that follows: one pointwise operation, or none if a norm, a
resize or another sum absorbs them. Exact in real arithmetic:

- biases of maps that are added, normalised or resized (the weights sum to 1) are carried forward;
- a sum that a convolution accumulated in its destination is computed by its first reader;
- image and output channels are zero-padded to a multiple of PIXEL where convolutions alone read and
  write them, because tensor cores read and write 16 bytes at a time.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.engines.lowering.graph import (
    ACTIVATIONS,
    AddSpec,
    AffineSpec,
    ConvolutionSpec,
    Graph,
    GroupNormSpec,
    Map,
    NormSpec,
    Op,
    PointwiseSpec,
    Vector,
)
from ncsn_fast.engines.lowering.rewriting import name_uniquely, overwrite_inputs, with_maps

PIXEL = 8
_MAX_TERMS = 3  # most maps that one pointwise operation adds
_IN_PLACE = ("norm", "group_norm", "layer_norm", "affine", "leaky_relu", "pointwise", "resize_add")


@dataclasses.dataclass(frozen=True)
class _Value:
    """A pending map of the lowered graph: the weighted sum of maps, and of biases.

    weights: of the maps; all 1 if there are none.
    """

    terms: tuple[Map, ...]
    bias: tuple[Tensor, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def is_map(self) -> bool:
        return len(self.terms) == 1 and not self.bias and not self.weights

    @property
    def factors(self) -> tuple[float, ...]:
        return self.weights or (1.0,) * len(self.terms)

    def scaled(self, by: float) -> _Value:
        if by == 1.0:
            return self
        bias = tuple(by * b.detach() for b in self.bias)
        return _Value(self.terms, bias, tuple(by * w for w in self.factors))

    def plus(self, other: _Value) -> _Value:
        weighted = self.weights or other.weights
        return _Value(
            self.terms + other.terms,
            self.bias + other.bias,
            self.factors + other.factors if weighted else (),
        )


def fuse(graph: Graph) -> Graph:
    """Returns an equivalent graph whose convolutions have no bias and only write their output."""
    fused = _Fusion(graph).run()
    overwrite_inputs(fused, _IN_PLACE)
    name_uniquely(fused)
    return fused


class _Fusion:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.new = graph, copy.copy(graph)
        self.new.ops = []
        x = graph.input
        self.new.input = dataclasses.replace(x, channels=_padded(x.channels))
        self.values: dict[Map, _Value] = {x: _Value((self.new.input,))}
        self.readers = Counter(x for op in graph.ops for x in op.inputs)
        self.readers[graph.output] += 1
        if not all(_pads(op, x) for op in graph.ops if x in op.inputs) or graph.output is x:
            self.new.input.channels = x.channels
        self.pads_output = self.readers[graph.output] == 1

    def run(self) -> Graph:
        for op in self.graph.ops:
            for x in op.inputs:
                self.readers[x] -= 1
            self._rewrite(op)
        self.new.output = self._map("end", self.graph.output)
        return self.new

    def _rewrite(self, op: Op) -> None:
        x, y, spec = op.inputs[0], op.outputs[-1], op.spec
        if isinstance(spec, ConvolutionSpec):
            self._convolution(op, spec)
        elif op.kind in ("norm", "group_norm"):
            self._norm(op)
        elif isinstance(spec, AffineSpec):
            self._affine(op, spec)
        elif op.kind == "add" or op.kind.startswith("add_"):
            # Without an output for the sum, nothing reads the one that is made here.
            total = op.outputs[0] if len(op.outputs) > 1 or op.kind == "add" else copy.copy(y)
            self.values[total] = self._sum(op)
            if op.kind != "add":
                self._activate(op.name, total, y, op.kind.removeprefix("add_"))
        elif op.kind in ACTIVATIONS and spec is None:
            self._activate(op.name, x, y, op.kind)
        elif op.kind in ("resize", "resize_add", "nearest2"):
            inputs = [self._short(op.name, x) for x in op.inputs]
            self._emit(op, inputs)
            bias = tuple(b for value in inputs for b in value.bias)
            self.values[y] = dataclasses.replace(self.values[y], bias=bias)
        else:
            for x in op.inputs:
                self._map(op.name, x)
            self._emit(op, [self.values[x] for x in op.inputs])

    def _convolution(self, op: Op, spec: ConvolutionSpec) -> None:
        x, (y,) = self._map(op.name, op.inputs[0]), op.outputs
        padded = y is self.graph.output and self.pads_output and _pads(op, op.inputs[0])
        written = Map(_padded(spec.channels) if padded else spec.channels, y.height, y.width)
        bare = dataclasses.replace(spec, bias=None)
        self.new.ops.append(Op("conv", op.name, (x,), (written,), spec=bare))
        value = _Value((written,), () if spec.bias is None else (spec.bias,))
        if len(op.inputs) == 2:
            value = self._fewer(op.name, op.inputs[1], _MAX_TERMS - 1).plus(value)
        self.values[y] = value

    def _norm(self, op: Op) -> None:
        x = op.inputs[0]
        value = self._short(op.name, x, carries_bias=not self.readers[x])
        spec = op.spec
        if isinstance(spec, NormSpec):
            spec = dataclasses.replace(spec, bias=value.bias)
        elif isinstance(spec, GroupNormSpec):
            spec = dataclasses.replace(spec, biases=value.bias)
        self._emit(op, [value], spec)

    def _affine(self, op: Op, spec: AffineSpec) -> None:
        x, (y,) = op.inputs[0], op.outputs
        if not isinstance(spec.scale, float) or isinstance(spec.shift, Vector):
            value = self._short(op.name, x, carries_bias=not self.readers[x])
            self._emit(op, [value], dataclasses.replace(spec, biases=value.bias))
            return
        if self.readers[x]:  # what is read again later is computed once
            self._map(op.name, x)
        value, shift = self.values[x].scaled(spec.scale), spec.shift
        if isinstance(shift, float) and shift:
            shift = torch.full((y.channels,), shift)
        bias = (shift,) if isinstance(shift, Tensor) else ()
        total = copy.copy(y) if spec.activation else y
        self.values[total] = dataclasses.replace(value, bias=value.bias + bias)
        if spec.activation:
            self._activate(op.name, total, y, spec.activation)

    def _sum(self, op: Op) -> _Value:
        a, b = op.inputs
        for x in (a, b):  # what is read again later is computed once
            if self.readers[x] and not self.values[x].is_map:
                self._map(op.name, x)
        first = self._fewer(op.name, a, _MAX_TERMS - len(self._fewer(op.name, b, 1).terms))
        weights = op.spec if isinstance(op.spec, AddSpec) else AddSpec()
        return first.scaled(weights.a).plus(self.values[b].scaled(weights.b))

    def _activate(self, name: str, x: Map, y: Map, activation: str) -> None:
        """Emits y = activation(x), and x as well if it is read again and is no map yet."""
        value = self.values[x]
        written = bool(self.readers[x]) and not value.is_map
        outputs = self._pointwise(name, value, written, activation)
        self.values[y] = _Value((outputs[-1],))
        if written:
            self.values[x] = _Value((outputs[0],))

    def _map(self, name: str, x: Map) -> Map:
        """Returns x as one map, emitting its sum if there is none yet."""
        if not self.values[x].is_map:
            outputs = self._pointwise(f"{name}.sum", self.values[x], True)
            self.values[x] = _Value(outputs)
        return self.values[x].terms[0]

    def _fewer(self, name: str, x: Map, most: int) -> _Value:
        """Returns x as a sum of at most `most` maps, and of biases."""
        if len(self.values[x].terms) > most:
            self._map(name, x)
        return self.values[x]

    def _short(self, name: str, x: Map, *, carries_bias: bool = True) -> _Value:
        """Returns x as one map without a weight, with its biases if the reader can absorb them."""
        value = self.values[x]
        if value.weights or (value.bias and not carries_bias):
            self._map(name, x)
        return self._fewer(name, x, 1)

    def _emit(self, op: Op, inputs: list[_Value], spec: Any = None) -> None:
        """Emits an operation on the maps of its inputs."""
        names = dict(zip(op.inputs, (value.terms[0] for value in inputs), strict=True))
        names |= {y: copy.copy(y) for y in op.outputs}
        bare = dataclasses.replace(op, overwrites=(), spec=op.spec if spec is None else spec)
        self.new.ops.append(with_maps(bare, names))
        self.values |= {y: _Value((names[y],)) for y in op.outputs}

    def _pointwise(
        self, name: str, value: _Value, total: bool, activation: str = ""
    ) -> tuple[Map, ...]:
        count = total + bool(activation)
        outputs = tuple(copy.copy(value.terms[0]) for _ in range(count))
        spec = PointwiseSpec(total, activation, value.bias, value.weights)
        self.new.ops.append(Op("pointwise", name, value.terms, outputs, spec=spec))
        return outputs


def _pads(op: Op, x: Map) -> bool:
    """Whether an operation is a convolution that may read x, and write, more channels of zeros."""
    plain = isinstance(op.spec, ConvolutionSpec) and op.spec.groups == 1
    return plain and op.inputs == (x,)


def _padded(channels: int) -> int:
    return -(-channels // PIXEL) * PIXEL

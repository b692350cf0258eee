"""Fusion for the GPU: one pointwise pass between two convolutions.

cuDNN's convolutions only write their output, so the biases, residual sums and ELU of the lowered
graph move into the pass that follows: one pointwise operation, or none if a norm, a resize or
another sum absorbs the bias. Exact in real arithmetic:

- biases of maps that are added, normalised or resized (the weights sum to 1) are carried forward;
- a sum that a convolution accumulated in its destination is computed by its first reader;
- image and output channels are zero-padded to a multiple of PIXEL, because tensor cores read and
  write 16 bytes at a time.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from torch import Tensor

from ncsn_fast.engines.lowering.graph import (
    AddSpec,
    ConvolutionSpec,
    Graph,
    Map,
    NormSpec,
    Op,
    PointwiseSpec,
    UnsupportedNetwork,
)

PIXEL = 8
_EPSILON = 1e-5  # of the kernels' norms
_KINDS = (
    "conv", "norm", "elu", "add", "add_elu", "max_pool5", "avg_pool5", "mean_pool2", "resize_add",
)  # fmt: skip
_MAX_TERMS = 3  # most maps that one pointwise operation adds
_IN_PLACE: tuple[str, ...] = ("norm", "pointwise", "resize_add")


@dataclasses.dataclass(frozen=True)
class _Value:
    """A pending map of the lowered graph: the sum of maps and of biases."""

    terms: tuple[Map, ...]
    bias: tuple[Tensor, ...] = ()

    @property
    def is_map(self) -> bool:
        return len(self.terms) == 1 and not self.bias


def fuse(graph: Graph) -> Graph:
    """Returns an equivalent graph whose convolutions have no bias and only write their output."""
    return _reuse_memory(_Fusion(graph).run())


def check_fusable(graph: Graph) -> None:
    """Raises UnsupportedNetwork, naming the operation, unless `fuse` covers a graph."""
    for op in graph.ops:
        spec = op.spec
        plain = op.kind in _KINDS and (op.kind != "add_elu" or len(op.outputs) == 2)
        if isinstance(spec, ConvolutionSpec):
            plain = spec.groups == 1 and (spec.stride == 1 or spec.pooled)
        elif isinstance(spec, NormSpec):
            plain = not spec.vectors and spec.eps == _EPSILON
        if not plain or isinstance(spec, AddSpec):
            path = f" ({op.name})" if op.name else ""
            raise UnsupportedNetwork(f"the operation {op.kind}{path}")
    if graph.batch is not None:
        raise UnsupportedNetwork(f"a batch size of {graph.batch} only")


class _Fusion:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        x = graph.input
        self.new = Graph(_padded(x.channels), x.height, x.width)
        self.values: dict[Map, _Value] = {x: _Value((self.new.input,))}
        self.readers = Counter(x for op in graph.ops for x in op.inputs)
        self.readers[graph.output] += 1

    def run(self) -> Graph:
        for op in self.graph.ops:
            for x in op.inputs:
                self.readers[x] -= 1
            self._rewrite(op)
        self.new.output = self._map("end", self.graph.output)
        return self.new

    def _rewrite(self, op: Op) -> None:
        x = op.inputs[0]
        if isinstance(op.spec, ConvolutionSpec):
            self._convolution(op, op.spec)
        elif isinstance(op.spec, NormSpec):
            value = self._short(op.name, x, carries_bias=not self.readers[x])
            spec = dataclasses.replace(op.spec, bias=value.bias)
            self._emit("norm", op, value.terms, spec)
        elif op.kind == "elu":
            self._activate(op, x, op.outputs[0])
        elif op.kind == "add":
            self.values[op.outputs[0]] = self._sum(op)
        elif op.kind == "add_elu":
            total, y = op.outputs
            self.values[total] = self._sum(op)
            self._activate(op, total, y)
        elif op.kind == "resize_add":
            small, into = (self._short(op.name, x) for x in op.inputs)
            self._emit("resize_add", op, (*small.terms, *into.terms), None, small.bias + into.bias)
        else:
            self._emit(op.kind, op, (self._map(op.name, x),), None)

    def _convolution(self, op: Op, spec: ConvolutionSpec) -> None:
        x, (y,) = self._map(op.name, op.inputs[0]), op.outputs
        channels = _padded(spec.channels) if y is self.graph.output else spec.channels
        written = Map(channels, y.height, y.width)
        bare = dataclasses.replace(spec, bias=None)
        self.new.ops.append(Op("conv", op.name, (x,), (written,), spec=bare))
        value = _Value((written,), () if spec.bias is None else (spec.bias,))
        if len(op.inputs) == 2:
            into = self._fewer(op.name, op.inputs[1], _MAX_TERMS - 1)
            value = _Value((*into.terms, written), into.bias + value.bias)
        self.values[y] = value

    def _sum(self, op: Op) -> _Value:
        a, b = op.inputs
        for x in (a, b):  # what is read again later is computed once
            if self.readers[x] and not self.values[x].is_map:
                self._map(op.name, x)
        first = self._fewer(op.name, a, _MAX_TERMS - len(self._fewer(op.name, b, 1).terms))
        second = self.values[b]
        return _Value(first.terms + second.terms, first.bias + second.bias)

    def _activate(self, op: Op, x: Map, y: Map) -> None:
        """Emits y = elu(x), and x as well if it is read again and is no map yet."""
        value = self.values[x]
        written = bool(self.readers[x]) and not value.is_map
        outputs = self._pointwise(f"{op.name}", value, total=written, elu=True)
        self.values[y] = _Value((outputs[-1],))
        if written:
            self.values[x] = _Value((outputs[0],))

    def _map(self, name: str, x: Map) -> Map:
        """Returns x as one map, emitting its sum if there is none yet."""
        if not self.values[x].is_map:
            outputs = self._pointwise(f"{name}.sum", self.values[x], total=True, elu=False)
            self.values[x] = _Value(tuple(outputs))
        return self.values[x].terms[0]

    def _fewer(self, name: str, x: Map, most: int) -> _Value:
        """Returns x as a sum of at most `most` maps, and of biases."""
        if len(self.values[x].terms) > most:
            self._map(name, x)
        return self.values[x]

    def _short(self, name: str, x: Map, *, carries_bias: bool = True) -> _Value:
        """Returns x as one map, with its biases if the reader can absorb them."""
        if not carries_bias and self.values[x].bias:
            self._map(name, x)
        return self._fewer(name, x, 1)

    def _emit(
        self,
        kind: str,
        op: Op,
        inputs: tuple[Map, ...],
        spec: NormSpec | None,
        bias: tuple[Tensor, ...] = (),
    ) -> None:
        (y,) = op.outputs
        written = dataclasses.replace(y)
        self.new.ops.append(Op(kind, op.name, inputs, (written,), spec=spec))
        self.values[y] = _Value((written,), bias)

    def _pointwise(self, name: str, value: _Value, *, total: bool, elu: bool) -> tuple[Map, ...]:
        outputs = tuple(dataclasses.replace(value.terms[0]) for _ in range(total + elu))
        spec = PointwiseSpec(total, elu, value.bias)
        self.new.ops.append(Op("pointwise", name, value.terms, outputs, spec=spec))
        return outputs


def _reuse_memory(graph: Graph) -> Graph:
    """Lets outputs overwrite inputs that nothing reads afterwards, where kernels allow it."""
    last = {x: i for i, op in enumerate(graph.ops) for x in op.inputs}
    last[graph.input] = last[graph.output] = len(graph.ops)
    for i, op in enumerate(graph.ops):
        if op.kind not in _IN_PLACE:
            continue
        candidates = op.inputs[1:] if op.kind == "resize_add" else op.inputs
        free = [x for x in dict.fromkeys(candidates) if last[x] == i]
        pairs = tuple(zip(op.outputs, free, strict=False))
        graph.ops[i] = dataclasses.replace(op, overwrites=pairs)
    return graph


def _padded(channels: int) -> int:
    return -(-channels // PIXEL) * PIXEL

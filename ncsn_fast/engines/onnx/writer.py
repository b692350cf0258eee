"""ONNX graphs as plain data: nodes, constants and dtypes, without the onnx package.

engines/onnx/network.py writes networks with it; engines/onnx/model.py turns them into files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

CONSTANTS = "constants/"  # name prefix of constants that are not parameters of the module


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the graph; `constant` if it is one that no operator has read yet."""

    name: str
    dtype: torch.dtype
    constant: Tensor | None = None


NOTHING = Value("", torch.float32)  # an optional input that is omitted


@dataclasses.dataclass(frozen=True)
class Node:
    """One ONNX operator."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


class Writer:
    """Nodes and constants of a graph, collected one operator at a time.

    Constants are stored with the first operator that reads them, in the dtype that it reads.

    Args:
        dtype: of feature maps and the parameters of convolutions; all else is float32.
        wide: whether what does not depend on maps is float64 where the network has it so.

    Attributes:
        scope: name of the submodule being written, from which nodes get their names.
        parameters: names of the module's parameters and buffers, by the names of constants.
        computed: whether a constant was computed from parameters.
    """

    def __init__(self, dtype: torch.dtype, *, wide: bool = False) -> None:
        self.dtype, self.wide = dtype, wide
        self.nodes: list[Node] = []
        self.constants: dict[str, Tensor] = {}
        self.parameters: dict[str, str] = {}
        self.computed = False
        self.scope = ""
        self._uses: dict[str, int] = {}
        self._casts: dict[tuple[str, torch.dtype], Value] = {}

    def op(
        self,
        kind: str,
        *inputs: Value,
        dtype: torch.dtype | None = None,
        name: str | None = None,
        **attributes: Any,
    ) -> Value:
        """Appends an operator; the result has its first input's dtype, unless given."""
        name = self._append(kind, inputs, name, attributes)
        return Value(name, dtype or inputs[0].dtype)

    def split(self, x: Value, axis: int, sizes: list[int]) -> list[Value]:
        """Appends an operator that cuts x along an axis into parts of these sizes."""
        name = self._append("Split", (x, self.ints(*sizes)), None, {"axis": axis}, len(sizes))
        return [Value(part, x.dtype) for part in _outputs(name, len(sizes))]

    def _append(
        self,
        kind: str,
        inputs: tuple[Value, ...],
        name: str | None,
        attributes: Mapping[str, Any],
        n_outputs: int = 1,
    ) -> str:
        if name is None:
            name = f"{self.scope}/{kind}"
            self._uses[name] = self._uses.get(name, 0) + 1
            if self._uses[name] > 1:
                name = f"{name}_{self._uses[name]}"
        names = tuple(map(self._stored, inputs))
        self.nodes.append(Node(kind, name, names, _outputs(name, n_outputs), attributes))
        return name

    def _stored(self, value: Value) -> str:
        """Returns the name of a value, after storing it if it is a constant."""
        if value.constant is None:
            return value.name
        name = value.name
        if name in self.constants and self.constants[name].dtype is not value.dtype:
            name = f"{name} as {str(value.dtype).removeprefix('torch.')}"
        if name not in self.constants:
            self.constants[name] = value.constant.detach().to("cpu", value.dtype).contiguous()
            if not name.startswith(CONSTANTS):
                self.parameters[name] = value.name
        return name

    def drop_unread(self, output: str) -> None:
        """Drops what an output does not depend on."""
        kept: list[Node] = []
        read = {output}
        for node in reversed(self.nodes):
            if not read.isdisjoint(node.outputs):
                kept.append(node)
                read.update(node.inputs)
        self.nodes = kept[::-1]
        self.constants = {name: t for name, t in self.constants.items() if name in read}

    def cast(self, x: Value, dtype: torch.dtype) -> Value:
        """Casts x to another dtype; returns x itself if it has that dtype."""
        if x.dtype is dtype:
            return x
        if x.constant is not None:
            return Value(x.name, dtype, x.constant)
        key = x.name, dtype
        if key not in self._casts:
            self._casts[key] = self.op("Cast", x, dtype=dtype, to=dtype)
        return self._casts[key]

    def fp32(self, x: Value) -> Value:
        return self.cast(x, torch.float32)

    def low(self, x: Value) -> Value:
        return self.cast(x, self.dtype)

    def scalar(self, number: float) -> Value:
        """Returns a float32 constant, which a cast gives in full precision."""
        exact = _constant(f"{number!r}", torch.tensor(number, dtype=torch.float64))
        return dataclasses.replace(exact, dtype=torch.float32)

    def ints(self, *numbers: int) -> Value:
        """Returns an int64 vector: axes or a shape."""
        return _constant(
            f"{'_'.join(map(str, numbers))}_i", torch.tensor(numbers, dtype=torch.int64)
        )

    def index(self, number: int) -> Value:
        """Returns an int64 scalar: an index."""
        return _constant(f"{number}_at", torch.tensor(number, dtype=torch.int64))

    def floats(self, *numbers: float) -> Value:
        """Returns a float32 vector."""
        vector = torch.tensor(numbers, dtype=torch.float32)
        return _constant(f"{'_'.join(map(repr, numbers))}_f", vector)

    def constant(self, name: str, tensor: Tensor) -> Value:
        """Returns a tensor as a constant."""
        return _constant(name, tensor)

    def mean(self, x: Value, *axes: int) -> Value:
        """Appends the mean over axes, which keep size 1."""
        return self.op("ReduceMean", x, self.ints(*axes), keepdims=1)

    def total(self, x: Value, *axes: int) -> Value:
        """Appends the sum over axes, which keep size 1."""
        return self.op("ReduceSum", x, self.ints(*axes), keepdims=1)

    def rooted(self, variance: Value, eps: float) -> Value:
        """Appends sqrt(variance + eps)."""
        return self.op("Sqrt", self.op("Add", variance, self.scalar(eps)))


def _outputs(name: str, n: int) -> tuple[str, ...]:
    return (name,) if n == 1 else tuple(f"{name}:{i}" for i in range(n))


def _constant(name: str, tensor: Tensor) -> Value:
    return Value(CONSTANTS + name, tensor.dtype, tensor)

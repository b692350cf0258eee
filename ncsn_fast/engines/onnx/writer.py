"""ONNX graphs as plain data: nodes, constants and dtypes, without the onnx package.

engines/onnx/network.py writes networks with it; engines/onnx/model.py turns them into files.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor of the graph; a map has the image's height and width, halved `halvings` times."""

    name: str
    dtype: torch.dtype
    halvings: int = 0


CONSTANTS = "constants/"  # name prefix of constants that are not parameters of the module
NOTHING = Value("", torch.float32)  # an optional input that is omitted


@dataclasses.dataclass(frozen=True)
class Node:
    """One ONNX operator."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any]


class Writer:
    """Nodes and constants of a module's graph, collected one operator at a time.

    Args:
        module: its parameters and buffers are stored under their state-dict keys.
        dtype: of feature maps and the parameters of convolutions; all else is float32.
        shape: (N, H, W) of the images if all of it is fixed.

    Attributes:
        scope: name of the submodule being written, from which nodes get their names.
    """

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, shape: tuple[int, int, int] | None = None
    ) -> None:
        self.dtype, self._shape = dtype, shape
        self.nodes: list[Node] = []
        self.constants: dict[str, Tensor] = {}
        self.scope = ""
        self._modules = {id(m): name for name, m in module.named_modules()}
        tensors = (*module.named_parameters(), *module.named_buffers())
        self._keys = {id(tensor): key for key, tensor in tensors}
        self._uses: dict[str, int] = {}

    @contextlib.contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        """Names the nodes of the block after this submodule."""
        before, self.scope = self.scope, self._modules[id(module)]
        yield
        self.scope = before

    def op(
        self,
        kind: str,
        *inputs: Value,
        dtype: torch.dtype | None = None,
        halve: bool = False,
        name: str | None = None,
        **attributes: Any,
    ) -> Value:
        """Appends an operator; the result has its first input's dtype and size, unless given."""
        if name is None:
            name = f"{self.scope}/{kind}"
            self._uses[name] = self._uses.get(name, 0) + 1
            if self._uses[name] > 1:
                name = f"{name}_{self._uses[name]}"
        names = tuple(value.name for value in inputs)
        self.nodes.append(Node(kind, name, names, name, attributes))
        first = inputs[0]
        return Value(name, dtype or first.dtype, first.halvings + halve)

    def shape(self, x: Value) -> tuple[int, int, int] | None:
        """Returns (N, H, W) of a map; None if the shape of the images is dynamic."""
        if self._shape is None:
            return None
        n, height, width = self._shape
        return n, height >> x.halvings, width >> x.halvings

    def cast(self, x: Value, dtype: torch.dtype) -> Value:
        """Casts x to another dtype; returns x itself if it has that dtype."""
        return x if x.dtype is dtype else self.op("Cast", x, dtype=dtype, to=dtype)

    def fp32(self, x: Value) -> Value:
        return self.cast(x, torch.float32)

    def low(self, x: Value) -> Value:
        return self.cast(x, self.dtype)

    def tensor(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> Value:
        """Adds a parameter or buffer, under its state-dict key."""
        key = self._keys[id(tensor)]
        self.constants[key] = tensor.detach().to("cpu", dtype).contiguous()
        return Value(key, dtype)

    def scalar(self, number: float) -> Value:
        """Adds a float32 constant."""
        return self._constant(f"{CONSTANTS}{number!r}", torch.tensor(number, dtype=torch.float32))

    def ints(self, *numbers: int) -> Value:
        """Adds an int64 vector: axes or a shape."""
        name = CONSTANTS + "_".join(map(str, numbers))
        return self._constant(f"{name}_i", torch.tensor(numbers, dtype=torch.int64))

    def index(self, number: int) -> Value:
        """Adds an int64 scalar: an index."""
        return self._constant(f"{CONSTANTS}{number}_at", torch.tensor(number, dtype=torch.int64))

    def _constant(self, name: str, tensor: Tensor) -> Value:
        self.constants[name] = tensor
        return Value(name, tensor.dtype)

    def mean(self, x: Value, *axes: int) -> Value:
        """Appends the mean over axes, which keep size 1."""
        return self.op("ReduceMean", x, self.ints(*axes), keepdims=1)

    def total(self, x: Value, *axes: int) -> Value:
        """Appends the sum over axes, which keep size 1."""
        return self.op("ReduceSum", x, self.ints(*axes), keepdims=1)

    def rooted(self, variance: Value, eps: float) -> Value:
        """Appends sqrt(variance + eps)."""
        return self.op("Sqrt", self.op("Add", variance, self.scalar(eps)))

"""ATen operations, as torch.export finds them, in ONNX's standard operators.

Convolutions, and matrix products of maps, compute in the writer's dtype; norms, softmax, and what
depends on the noise level alone compute in float32, and pointwise operations in the wider dtype of
their inputs. Sizes are those of the exported network, but for the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ncsn_fast.engines.lowering.export import Exported
from ncsn_fast.engines.lowering.graph import UnsupportedNetwork
from ncsn_fast.engines.onnx.writer import CONSTANTS, Value, Writer

aten = torch.ops.aten
Handler = Callable[..., Any]  # (translation, node, *args of the operation, **kwargs)
_HANDLERS: dict[str, Handler] = {}  # by the operation's name without overload


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Registers the translation of operations."""

    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class Translation:
    """Values of an exported graph's nodes, written one after the other.

    Arguments of handlers are Values, Python numbers, or lists of them; batch sizes are None.
    """

    def __init__(self, exported: Exported, w: Writer, inputs: Sequence[Value]) -> None:
        self.exported, self.w = exported, w
        self.values: dict[fx.Node, Any] = dict(zip(exported.inputs, inputs, strict=True))

    def run(self) -> Value:
        for node in self.exported.nodes:
            tensor = isinstance(node.meta.get("val"), (Tensor, list, tuple))
            if tensor and self.exported.depends(node) != "constant" and node not in self.values:
                self._write(node)
        return self.value(self.exported.output)

    def _write(self, node: fx.Node) -> None:
        name = name_of(node)
        handler = _HANDLERS.get(name)
        path = self.exported.path(node)
        if handler is None:
            inside = f" in {path}" if path else ""
            raise UnsupportedNetwork(f"the operation {name}{inside}, which has no ONNX translation")
        self.w.scope = path
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._argument)
        self.values[node] = handler(self, node, *args, **kwargs)

    def _argument(self, node: fx.Node) -> Any:
        """Returns a node as a handler takes it."""
        kind = self.exported.depends(node)
        if kind == "batch" and not isinstance(node.meta["val"], Tensor):
            return None
        if kind == "constant" and not isinstance(self.exported.constant(node), Tensor):
            return self.exported.constant(node)
        return self.value(node)

    def value(self, node: fx.Node) -> Any:
        if node not in self.values:
            self.values[node] = self._constant(node)
        return self.values[node]

    def _constant(self, node: fx.Node) -> Value:
        tensor, name = self.exported.constant(node), self.exported.parameter(node)
        dtype = torch.float32 if tensor.is_floating_point() else torch.int64
        dtype = torch.bool if tensor.dtype is torch.bool else dtype
        name = name or f"{CONSTANTS}{node.name}"
        self.w.constants[name] = tensor.detach().to("cpu", dtype).contiguous()
        return Value(name, dtype)

    def low(self, node: fx.Node, value: Value) -> Value:
        """Casts an input of a product: to the writer's dtype, for products of maps."""
        of_maps = self.exported.depends(node) == "map"
        if self.w.dtype is not torch.float32 and of_maps and value.name in self.w.constants:
            key = f"{value.name} as {self.w.dtype}"  # weights are stored in the type they are used
            self.w.constants[key] = self.w.constants[value.name].to(self.w.dtype)
            return Value(key, self.w.dtype)
        return self.w.low(value) if of_maps else self.w.fp32(value)

    def shape(self, node: fx.Node) -> list[int]:
        """Returns the shape of a node's tensor, with -1 where the number of images counts."""
        return [n if isinstance(n, int) else -1 for n in node.meta["val"].shape]

    def same(self, *values: Value | float | int) -> list[Value]:
        """Casts operands to one dtype, and numbers to constants of it."""
        tensors = [v for v in values if isinstance(v, Value)]
        kinds = {v.dtype for v in tensors}
        floats = [k for k in kinds if k.is_floating_point]
        number = any(isinstance(v, float) for v in values)
        if torch.float32 in floats or (not floats and number):
            kind = torch.float32
        else:
            kind = floats[0] if floats else tensors[0].dtype
        return [self._as(v, kind) for v in values]

    def _as(self, value: Value | float | int, kind: torch.dtype) -> Value:
        if isinstance(value, Value):
            return self.w.cast(value, kind)
        if kind.is_floating_point:
            return self.w.cast(self.w.scalar(float(value)), kind)
        return self.w.index(int(value))

    def sizes(self, shape: Sequence[int]) -> Value:
        """Returns a shape as a vector, with the number of images for -1."""
        if -1 not in shape:
            return self.ints(*shape)
        images = self.w.op("Shape", self.value(self.exported.inputs[0]), dtype=torch.int64, end=1)
        parts = [images if n == -1 else self.ints(n) for n in shape]
        return self.w.op("Concat", *parts, axis=0) if len(parts) > 1 else images

    def ints(self, *numbers: int) -> Value:
        return self.w.ints(*numbers)

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        return self.w.op("Reshape", x, self.ints(*shape))

    def rank(self, node: fx.Node) -> int:
        return node.meta["val"].ndim


def name_of(node: fx.Node) -> str:
    """Returns the name of a node's operation, without namespace, overload or underscore."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket).removeprefix("aten.").removesuffix("_")
    return getattr(target, "__name__", str(target))


def input_of(node: fx.Node, index: int = 0) -> fx.Node:
    """Returns a tensor argument of a node."""
    found = node.args[index]
    assert isinstance(found, fx.Node)
    return found

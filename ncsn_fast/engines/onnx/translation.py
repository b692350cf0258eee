"""ATen operations, as torch.export finds them, in ONNX's standard operators.

Convolutions, pools, concatenations and matrix products of maps compute in the writer's dtype.
Norms, softmax, bilinear resizing, and what depends on the noise level alone compute in float32, for
sums of squares do not survive a mantissa of 8 bits; pointwise operations compute in the wider dtype
of their inputs. In bfloat16 graphs, nearest resizing and transposed convolutions are float32, too,
because TensorRT has no others.

What the writer calls wide, parts of the time of a network, is float64 where the network has it so.
Sizes are those of the exported network, or open. Two rewritings are exact in real arithmetic: a
mean over squares of pixels moves before a 1x1 convolution, and reshaping twice is reshaping once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ncsn_fast.engines.lowering.export import Exported
from ncsn_fast.engines.lowering.graph import UnsupportedNetwork
from ncsn_fast.engines.onnx.writer import CONSTANTS, Value, Writer

aten = torch.ops.aten
# Of parameters, these are written rather than computed, so that files hold the parameters as such.
_VIEWS = frozenset(("slice", "unsqueeze", "to"))
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

    Arguments of handlers are Values, Python numbers, or lists of them; open sizes are None.

    Args:
        inputs: of the network.
        sizes: numbers in place of open sizes of the images, by their axis.
    """

    def __init__(
        self,
        exported: Exported,
        w: Writer,
        inputs: Sequence[Value],
        sizes: Mapping[int, int] | None = None,
    ) -> None:
        self.exported, self.w = exported, w
        self._known = exported.symbols(sizes or {})
        self.values: dict[fx.Node, Any] = dict(zip(exported.inputs, inputs, strict=True))
        self._whole: dict[str, Value] = {}  # what was reshaped, by the name of the result

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
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._argument)
        self.w.scope = path
        self.values[node] = handler(self, node, *args, **kwargs)

    def _argument(self, node: fx.Node) -> Any:
        """Returns a node as a handler takes it."""
        if isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            return self.value(node)
        if self.exported.depends(node) == "constant":
            found = self.exported.constant(node)
            return self.value(node) if isinstance(found, Tensor) else found
        return None

    def value(self, node: fx.Node) -> Any:
        if node not in self.values:
            if self._is_view(node):
                self._write(node)
            else:
                self.values[node] = self._constant(node)
        return self.values[node]

    def _is_view(self, node: fx.Node) -> bool:
        """Whether a constant is a parameter in another shape."""
        first = node
        while node.op == "call_function" and name_of(node) in _VIEWS:
            node = input_of(node)
        return node is not first and self.exported.parameter(node) is not None

    def _constant(self, node: fx.Node) -> Value:
        tensor, name = self.exported.constant(node), self.exported.parameter(node)
        dtype = torch.float32 if tensor.is_floating_point() else torch.int64
        dtype = torch.bool if tensor.dtype is torch.bool else dtype
        self.w.computed |= name is None and self.exported.depends_on_weights(node)
        return Value(name or f"{CONSTANTS}{node.name}", dtype, tensor)

    def low(self, node: fx.Node, value: Value) -> Value:
        """Casts an input of an operation: to the writer's dtype, if it is one of maps."""
        return self.w.low(value) if self.exported.depends(node) == "map" else self.w.fp32(value)

    def kind_without_bfloat16(self, node: fx.Node) -> torch.dtype:
        """Returns the dtype of an operation that TensorRT does not run in bfloat16."""
        of_maps = self.exported.depends(node) == "map"
        return self.w.dtype if of_maps and self.w.dtype is torch.float16 else torch.float32

    def shape(self, node: fx.Node) -> list[int]:
        """Returns the shape of a node's tensor, with -1 for open sizes."""
        return [self._number(n) for n in node.meta["val"].shape]

    def _number(self, size: int | torch.SymInt) -> int:
        if isinstance(size, int):
            return size
        known = size.node.expr.subs(self._known)
        return int(known) if known.is_number else -1

    def same(self, *values: Value | float | int) -> list[Value]:
        """Casts operands to one dtype, and numbers to constants of it."""
        tensors = [v for v in values if isinstance(v, Value)]
        kinds = {v.dtype for v in tensors}
        floats = [k for k in kinds if k.is_floating_point]
        number = any(isinstance(v, float) for v in values)
        if torch.float64 in floats:
            kind = torch.float64
        elif torch.float32 in floats or (not floats and number):
            kind = torch.float32
        else:
            kind = floats[0] if floats else tensors[0].dtype
        return [self._as(v, kind) for v in values]

    def number(self, value: float | int, kind: torch.dtype) -> Value:
        """Returns a number as a constant."""
        if kind.is_floating_point:
            return self.w.cast(self.w.scalar(float(value)), kind)
        return self.w.index(int(value))

    def _as(self, value: Value | float | int, kind: torch.dtype) -> Value:
        return self.w.cast(value, kind) if isinstance(value, Value) else self.number(value, kind)

    def sizes(self, shape: Sequence[int]) -> Value:
        """Returns a shape as a vector, with the number of images for -1."""
        if -1 not in shape:
            return self.w.ints(*shape)
        images = self.w.op("Shape", self.value(self.exported.inputs[0]), dtype=torch.int64, end=1)
        parts = [images if n == -1 else self.w.ints(n) for n in shape]
        return self.w.op("Concat", *parts, axis=0) if len(parts) > 1 else images

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """Reshapes x, or what x was reshaped from."""
        whole = self._whole.get(x.name, x)
        y = self.w.op("Reshape", whole, self.w.ints(*shape))
        self._whole[y.name] = whole
        return y

    def size(self, node: fx.Node, axes: Sequence[int]) -> Value:
        """Returns the product of some sizes of a node's tensor, float32."""
        sizes = [self.shape(node)[axis] for axis in axes]
        if -1 not in sizes:
            return self.w.scalar(float(math.prod(sizes)))
        shape = self.w.op("Shape", self.value(node), dtype=torch.int64)
        wanted = self.w.op("Gather", shape, self.w.ints(*axes), axis=0)
        return self.w.fp32(self.w.op("ReduceProd", wanted, keepdims=0))

    def rank(self, node: fx.Node) -> int:
        return node.meta["val"].ndim


def is_translated(target: Any) -> bool:
    """Tells whether an operation has a translation, or is none of tensors."""
    return not isinstance(target, torch._ops.OpOverload) or _name(target) in _HANDLERS


def name_of(node: fx.Node) -> str:
    """Returns the name of a node's operation, without namespace, overload or underscore."""
    return _name(node.target)


def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket).removeprefix("aten.").removesuffix("_")
    return getattr(target, "__name__", str(target))


def input_of(node: fx.Node, index: int = 0) -> fx.Node:
    """Returns a tensor argument of a node."""
    found = node.args[index]
    assert isinstance(found, fx.Node)
    return found

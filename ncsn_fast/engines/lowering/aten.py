"""From nodes of an exported network to operations of a graph, one for each; passes.py fuses them.

A value of the network is a `View`: a map's memory and how the tensor lies in it, so that what only
changes shape or order (permute, reshape, chunk, ...) is no operation. Nodes without a handler, and
those whose handler declines, are collected and run by PyTorch, as one operation for several.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ncsn_fast.engines.lowering.export import Exported, Program
from ncsn_fast.engines.lowering.graph import (
    AffineSpec,
    CopySpec,
    Graph,
    Map,
    Op,
    Spec,
    TorchSpec,
    UnsupportedNetwork,
    Vector,
    View,
)


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A part of a map times a number, which is computed where the product itself is needed."""

    view: View
    scale: float


Value = View | Scaled | tuple[View, ...]
Function = Callable[["Lowering", fx.Node, SimpleNamespace], Value]


class Handler(NamedTuple):
    """Lowers the nodes of an ATen operation.

    Attributes:
        function: returns a node's value, for its arguments by name.
        joins: whether the operation becomes part of what PyTorch runs, if it follows such a part.
    """

    function: Function
    joins: bool


class Handlers(dict[Any, Handler]):
    """Handlers by ATen operation."""

    def lowers(self, *targets: Any, joins: bool = False) -> Callable[[Function], Function]:
        """Registers a handler of operations; see Handler."""

        def register(function: Function) -> Function:
            self.update(dict.fromkeys(targets, Handler(function, joins)))
            return function

        return register


class Declined(Exception):
    """A handler's answer to arguments that no operation covers."""


class Lowering:
    """The graph of an exported network, as far as it is lowered.

    Args:
        handlers: by ATen operation.

    Attributes:
        graph: the operations so far.
        values: views of the nodes that are lowered.
    """

    def __init__(
        self,
        net: nn.Module,
        exported: Exported,
        shape: tuple[int, ...],
        handlers: Handlers,
    ) -> None:
        self.exported, self._handlers = exported, handlers
        channels, height, width = shape
        self.graph = Graph(channels, height, width)
        self.graph.batch = exported.batch
        self.values: dict[fx.Node, Value] = {exported.inputs[0]: image(self.graph.input)}
        self._deferred: list[fx.Node] = []  # run by PyTorch; no operation of the graph yet
        self._vectors: dict[fx.Node, Vector] = {}
        self._parents = {name for name, module in net.named_modules() if [*module.children()]}

    def run(self) -> Graph:
        for node in self.exported.nodes:
            if self.exported.depends(node) == "map" and node.op == "call_function":
                self._lower(node)
        view = self.view(self.exported.output)
        graph, x = self.graph, self.graph.input
        if view.shape != (x.channels, x.height, x.width):
            raise UnsupportedNetwork(
                f"output of shape {view.shape} for an image of shape "
                f"{(x.channels, x.height, x.width)}"
            )
        graph.output = self.image_map(view)
        return graph

    def view(self, node: Any) -> View:
        """Returns the value of a node as a view of a map."""
        if node not in self.values and node in self._deferred:
            self._run_deferred()
        value = self.values.get(node)
        if isinstance(value, Scaled):
            x = self.contiguous(value.view)
            name = self.name(node, "affine")
            y = self.like(x)
            self.emit("affine", name, (x.map,), y.map, AffineSpec(value.scale))
            value = self.values[node] = y
        if not isinstance(value, View):
            raise Declined
        return value

    def scaled(self, node: Any) -> Scaled:
        """Returns the value of a node as a view of a map, and a number that it is multiplied by."""
        value = self.values.get(node)
        return value if isinstance(value, Scaled) else Scaled(self.view(node), 1.0)

    def is_map(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and self.exported.depends(node) == "map"

    def constant(self, node: Any) -> Any:
        """Returns the value of an argument that depends on nothing but parameters."""
        if not isinstance(node, fx.Node):
            return node
        if self.exported.depends(node) != "constant":
            raise Declined
        return self.exported.constant(node)

    def tensor(self, node: Any) -> Tensor | None:
        """Returns a constant tensor, or None."""
        value = self.constant(node)
        if value is not None and not isinstance(value, Tensor):
            raise Declined
        return value

    def vector(self, node: fx.Node, channels: int) -> Vector:
        """Returns the value of a condition as numbers (N, channels)."""
        if node not in self._vectors:
            self._vectors[node] = Vector(channels, node)
        if self._vectors[node].channels != channels:
            raise Declined
        return self._vectors[node]

    def emit(
        self, kind: str, name: str, inputs: Sequence[Map], y: Map, spec: Spec | None = None
    ) -> Map:
        self.graph.ops.append(Op(kind, name, tuple(inputs), (y,), spec=spec))
        return y

    def name(self, node: fx.Node, what: str = "") -> str:
        """Returns the path of a node's module, and `what` the node does if that is not plain."""
        path = self.exported.path(node)
        return ".".join(part for part in (path, what) if part) if path in self._parents else path

    def owner(self, node: fx.Node, what: str) -> str:
        """Returns the path of the module with a node's parameters, or what the node does."""
        return self.exported.path(node) or what

    def image_map(self, view: View, name: str = "copy") -> Map:
        """Returns a map that is a view (C, H, W) in channels-last order; copies it if need be."""
        if len(view.shape) != 3:
            raise Declined
        if is_image(view):
            return view.map
        y = Map(*view.shape)
        return self.emit("copy", name, (view.map,), y, CopySpec(view, image(y)))

    def contiguous(self, view: View, name: str = "copy") -> View:
        """Returns a view whose numbers lie in their order, the last axis as channels."""
        if is_tokens(view):
            return view
        target = fresh(view.shape, (view.map,))
        y = target.map
        self.emit("copy", name, (view.map,), y, CopySpec(view, target))
        return target

    def like(self, view: View) -> View:
        """Returns a view of a new map, as the given one, which must be all of its map."""
        m = view.map
        return View(Map(m.channels, m.height, m.width), view.shape, view.strides)

    def _lower(self, node: fx.Node) -> None:
        handler = self._handlers.get(node.target)
        try:
            if handler is None or (
                handler.joins and any(n in self._deferred for n in node.all_input_nodes)
            ):
                raise Declined
            self.values[node] = handler.function(self, node, self._arguments(node))
        except Declined:
            self._deferred.append(node)

    def _arguments(self, node: fx.Node) -> SimpleNamespace:
        """Returns a node's arguments by name, with the sizes that depend on N as numbers."""
        target: Any = node.target
        if not isinstance(target, torch._ops.OpOverload):
            return SimpleNamespace(args=node.args)

        def number(value: fx.Node) -> Any:
            is_number = not isinstance(value.meta.get("val"), (Tensor, list, tuple))
            if is_number and self.exported.depends(value) == "batch":
                return self.exported.number(value)
            return value

        args, kwargs = fx.map_arg((node.args, node.kwargs), number)
        schema = target._schema.arguments
        found = {argument.name: argument.default_value for argument in schema}
        found |= {argument.name: value for argument, value in zip(schema, args, strict=False)}
        return SimpleNamespace(**{**found, **kwargs})

    def _run_deferred(self) -> None:
        """Turns the deferred nodes into an operation, as far as others read them."""
        nodes, self._deferred = self._deferred, []
        within, needed = set(nodes), set(self.exported.nodes)
        outputs = [
            node
            for node in nodes
            if self._fits(node)
            and (node is self.exported.output or {*node.users} & needed - within)
        ]
        if not outputs:
            return
        boundary, vectors = self._boundary(outputs)
        program = Program(self.exported, [*boundary, *vectors])
        module = program.finish([program.copy(node) for node in outputs])
        inputs = tuple(self.view(node) for node in boundary)
        near = [view.map for view in inputs]
        views = tuple(fresh(self._shape(node), near, images=True) for node in outputs)
        spec = TorchSpec(
            module,
            inputs,
            views,
            program.parameters,
            tuple(self.vector(node, math.prod(self._shape(node))) for node in vectors),
            tuple(self._shape(node) for node in vectors),
        )
        self.graph.parameters |= program.tensors
        name = self._program_name(nodes)
        maps = tuple(view.map for view in inputs), tuple(view.map for view in views)
        self.graph.ops.append(Op("torch", name, *maps, spec=spec))
        self.values.update(zip(outputs, views, strict=True))

    def _boundary(self, outputs: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        """Returns the views and the conditions that nodes are computed from."""
        maps: dict[fx.Node, None] = {}
        vectors: dict[fx.Node, None] = {}
        pending, seen = [*outputs], set(outputs)
        while pending:
            for node in pending.pop().all_input_nodes:
                if node in seen:
                    continue
                seen.add(node)
                if self.exported.depends(node) == "condition":
                    vectors[node] = None
                elif isinstance(self.values.get(node), View):
                    maps[node] = None
                elif self.exported.depends(node) == "map":
                    pending.append(node)
        return [*maps], [*vectors]

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        shape = self.exported.shape(node)
        if shape is None:
            raise UnsupportedNetwork(
                f"conditions that are not of one image each, in {self.exported.path(node)}"
            )
        return shape

    def _fits(self, node: fx.Node) -> bool:
        """Whether a value can be a map: numbers of a network's type, image by image."""
        shape = self.exported.shape(node)
        return shape is not None and 0 not in shape and node.meta["val"].dtype is torch.float32

    def _program_name(self, nodes: list[fx.Node]) -> str:
        found = dict.fromkeys(
            str(node.target).split(".")[1]
            for node in nodes
            if isinstance(node.target, torch._ops.OpOverload) and not node.target.is_view
        )
        what = "+".join(found) or "view"
        path = self.exported.path(nodes[0])
        return f"{path}.{what}" if path else what


def image(x: Map) -> View:
    """Returns a map as a tensor (N, C, H, W)."""
    c = x.channels
    return View(x, (c, x.height, x.width), (1, x.width * c, c))


def raster(shape: Sequence[int], step: int = 1) -> tuple[int, ...]:
    """Returns the strides of a contiguous tensor whose last axis has stride `step`."""
    return tuple(step * math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _lies(view: View, strides: Sequence[int]) -> bool:
    """Whether a view is all of its map, with these strides; axes of size 1 have any."""
    matches = all(
        n == 1 or a == b for n, a, b in zip(view.shape, view.strides, strides, strict=True)
    )
    return view.offset == 0 and math.prod(view.shape) == view.map.numel and matches


def is_channels_first(view: View) -> bool:
    """Whether a view is (C, ...), all of its map of C channels."""
    c, *rest = view.shape or (0,)
    return c == view.map.channels and _lies(view, (1, *raster(rest, c)))


def is_image(view: View) -> bool:
    """Whether a view is (C, H, W), all of its map of this shape."""
    m = view.map
    return view.shape == (m.channels, m.height, m.width) and is_channels_first(view)


def is_tokens(view: View) -> bool:
    """Whether a view is (..., C), all of its map of C channels."""
    return view.shape[-1:] == (view.map.channels,) and _lies(view, raster(view.shape))


def is_rows(view: View) -> bool:
    """Whether a view is all of its map, contiguous: rows of the last axis."""
    return _lies(view, raster(view.shape))


def is_whole(view: View) -> bool:
    """Whether a view is all of its map, every number once, in any order."""
    order = sorted(range(len(view.shape)), key=lambda i: -view.strides[i])
    order = [i for i in order if view.shape[i] > 1]
    ordered = [view.shape[i] for i in order]
    packed = raster(ordered) == tuple(view.strides[i] for i in order)
    return view.offset == 0 and math.prod(view.shape) == view.map.numel and packed


def meta(view: View, images: int) -> Tensor:
    """Returns a tensor without memory that lies as the view does in that of so many images."""
    numel = view.map.numel
    memory = torch.empty(images * numel, device="meta")
    shape, strides = (images, *view.shape), (numel, *view.strides)
    return memory.as_strided(shape, strides, view.offset)


def view_of(x: Map, tensor: Tensor, images: int) -> View:
    """Returns a tensor in the memory of `meta` as a view; declines if it mixes images."""
    if tensor.ndim == 0 or tensor.shape[0] != images:
        raise Declined
    if images > 1 and tensor.stride(0) != x.numel:
        raise Declined
    return View(
        x, tuple(tensor.shape[1:]), tuple(tensor.stride()[1:]), int(tensor.storage_offset())
    )


def fresh(shape: tuple[int, ...], near: Sequence[Map], *, images: bool = False) -> View:
    """Returns a view of a new map for a tensor, contiguous; with `images`, (C, H, W) is an image.

    Tokens that are as many as the pixels of a map nearby are the pixels of such a map.
    """
    if images and len(shape) == 3:
        return image(Map(*shape))
    *rest, last = shape or (1,)
    count = math.prod(rest)
    size = next(((m.height, m.width) for m in near if m.height * m.width == count), (count, 1))
    return View(Map(last, *size), shape, raster(shape))

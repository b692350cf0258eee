"""A network as the graph of ATen operations that torch.export finds, and parts of it as programs.

Every node has one of four kinds, by what its value depends on: nothing but parameters ("constant"),
the number of images ("batch"), the network's conditions ("condition"), or its maps ("map").
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TextIO

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from ncsn_fast.engines.lowering.graph import UnsupportedNetwork

PROBE = 2  # images in the tensors that stand for all batch sizes
STAND_IN = 7919  # N in the shapes of a stored graph, where it may be any number
_UNITS = (3, 5)  # of open heights and widths, whose values must not be 0, 1 or the same
_MOST = 2**20  # pixels in an open height or width
Dependence = Literal["constant", "batch", "condition", "map"]
_ORDER: tuple[Dependence, ...] = ("constant", "batch", "condition", "map")
_SIZE = torch.ops.aten.sym_size.int
_ONE_EXPORT = threading.RLock()
_CONTIGUOUS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


class Traced(NamedTuple):
    """Graph of ATen operations that torch.export finds, and what its placeholders are.

    Attributes:
        graph: nodes have metadata "val" (a tensor with the shape of the value) and, of the modules
            whose forward computes them, "nn_module_stack".
        names: parameter or buffer that a placeholder is, by its name.
        tensors: parameters, buffers and other constants by their names.
        inputs: names of the network's inputs, the image first.
        output: name of the node of its output.
        weights: the placeholders that are parameters and buffers.
    """

    graph: fx.Graph
    names: dict[str, str]
    tensors: Mapping[str, Tensor]
    inputs: list[str]
    output: str
    weights: frozenset[str]


class Exported:
    """The exported graph of a network.

    Args:
        net: a module in evaluation mode.
        inputs: the image input (N, ...), then conditions (N, ...) or None; values do not matter.
        sizes: (a, b) for a network of images of any height and width a k + b; None for those of
            the image input.
        traced: the network as it was traced before; None to trace it.
        runs: as for `trace`.

    Attributes:
        nodes: what the output depends on, in order.
        output: the node of the network's output.
        batch: the batch size, if the network allows one only; else None.
        images: the number of images that stands for N where a number is needed.

    Raises:
        UnsupportedNetwork: torch cannot export the network.
    """

    def __init__(
        self,
        net: nn.Module,
        inputs: Sequence[Tensor | None],
        sizes: tuple[int, int] | None = None,
        traced: Traced | None = None,
        runs: Callable[[Any], bool] | None = None,
    ) -> None:
        traced = trace(net, inputs, sizes, runs) if traced is None else traced
        self.traced, self._names, self._weights = traced, traced.names, traced.weights
        self._tensors = {node: traced.tensors[name].detach() for node, name in self._names.items()}
        found = {node.name: node for node in traced.graph.nodes}
        self.inputs = [found[name] for name in traced.inputs]
        self.output = found[traced.output]
        size = self.inputs[0].meta["val"].shape[0]
        self.batch = size if isinstance(size, int) else size.node.maybe_as_int()
        self.batch = None if self.batch == STAND_IN else self.batch
        self.images = PROBE if self.batch is None else self.batch
        self._size = size
        self.nodes = _needed(traced.graph, self.output)
        self._kinds: dict[fx.Node, Dependence] = {}
        for node in self.nodes:
            self._kinds[node] = self._classify(node)
        self._folded: dict[fx.Node, Any] = {}
        self.kept: set[str] = set()  # parameters that are read by more than convolutions and norms

    def depends(self, node: fx.Node) -> Dependence:
        return self._kinds[node]

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """Returns the shape of one image's part of a value; None if it is not (N, ...)."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.ndim or not self._is_batch(value.shape[0]):
            return None
        rest = tuple(value.shape[1:])
        return rest if all(isinstance(n, int) for n in rest) else None

    def parameter(self, node: fx.Node) -> str | None:
        """Returns the name of the parameter or buffer that a node is."""
        return self._names.get(node.name) if node.op == "placeholder" else None

    def symbols(self, sizes: Mapping[int, int]) -> dict[Any, int]:
        """Returns numbers in place of the open sizes of the images, by their symbols.

        Args:
            sizes: by axes.
        """
        found = {}
        for axis, size in sizes.items():
            named = self.inputs[0].meta["val"].shape[axis]
            if isinstance(named, torch.SymInt):  # a symbol times a number plus a number
                (symbol,) = named.node.expr.free_symbols
                rest = named.node.expr.subs(symbol, 0)
                found[symbol] = (size - rest) / named.node.expr.coeff(symbol)
        return found

    def keep(self, node: fx.Node) -> None:
        """Notes that a parameter is read by more than convolutions and norms."""
        if (name := self.parameter(node)) is not None:
            self.kept.add(name)

    def constant(self, node: fx.Node) -> Any:
        """Returns the value of a constant node; a tensor, mostly."""
        if node.name in self._tensors:
            return self._tensors[node.name]
        if node not in self._folded:
            for each in node.all_input_nodes:
                self.keep(each)
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.constant)
            assert callable(node.target)
            with torch.inference_mode(mode=False), torch.no_grad():
                self._folded[node] = node.target(*args, **kwargs)
        return self._folded[node]

    def with_weights(self, tensors: Mapping[str, Tensor]) -> Exported:
        """Returns the graph with other parameters and buffers, by their names."""
        other = copy.copy(self)
        other._tensors = {
            node: tensors[self._names[node]].detach() if node in self._weights else tensor
            for node, tensor in self._tensors.items()
        }
        other._folded, other.kept = {}, set()
        return other

    def without_weights(self) -> Exported:
        """Returns the graph without the values of parameters and buffers."""
        empty = torch.empty(0)
        return self.with_weights({self._names[node]: empty for node in self._weights})

    def depends_on_weights(self, node: fx.Node) -> bool:
        """Whether a constant is computed from parameters or buffers of the network."""
        return node.name in self._weights or any(map(self.depends_on_weights, node.all_input_nodes))

    def number(self, node: fx.Node) -> Any:
        """Returns the value of a node of kind "batch" that is a number, for `images` images."""
        if node.target is _SIZE:
            return self.images
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.number)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def path(self, node: fx.Node) -> str:
        """Returns the path of the module whose forward computes a node; "" for the network."""
        stack = node.meta.get("nn_module_stack") or {}
        path = str(next(reversed(stack.values()))[0]) if stack else ""
        return path if path.isascii() and not path.startswith("_empty") else ""

    def _is_batch(self, size: Any) -> bool:
        return str(size) == str(self._size)

    def _classify(self, node: fx.Node) -> Dependence:
        if node.op == "placeholder":
            if node in self.inputs:
                return "condition" if self.inputs.index(node) else "map"
            return "constant"
        if node.op != "call_function":
            raise UnsupportedNetwork(f"control flow in {self.path(node) or 'its forward'}")
        if node.target is _SIZE and node.args[1] == 0:
            return "batch"
        kinds = (self._kinds[n] for n in node.all_input_nodes)
        return max(kinds, key=_ORDER.index, default="constant")


class Program:
    """Nodes of an exported network as a torch.fx graph module, called (N, *inputs, *parameters).

    Attributes:
        module: returns the tuple of outputs.
        inputs: nodes whose values the caller supplies.
        parameters: names of tensors that the caller supplies, in order; `tensors` holds them.
    """

    def __init__(self, exported: Exported, inputs: Iterable[fx.Node]) -> None:
        self.exported = exported
        self.graph = fx.Graph()
        self.batch = self.graph.placeholder("batch")
        self.inputs = list(inputs)
        self._copies = {node: self._placeholder(node.name, node) for node in self.inputs}
        self.tensors: dict[str, Tensor] = {}
        self._last = self.graph._root.prev

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def copy(self, node: fx.Node) -> fx.Node:
        """Adds a node and what it depends on; returns the copy."""
        if node not in self._copies:
            self._copies[node] = self._copy(node)
        return self._copies[node]

    def finish(self, outputs: Sequence[fx.Node]) -> fx.GraphModule:
        self.graph.output(tuple(outputs))
        self.graph.lint()
        return fx.GraphModule({}, self.graph)

    def _placeholder(self, name: str, node: fx.Node) -> fx.Node:
        placeholder = self.graph.placeholder(name)
        placeholder.meta["val"] = node.meta.get("val")
        return placeholder

    def _copy(self, node: fx.Node) -> fx.Node:
        exported = self.exported
        if node.target is _SIZE and exported.depends(node) == "batch":
            return self.batch
        if exported.depends(node) == "constant" and isinstance(
            value := exported.constant(node), Tensor
        ):
            name = exported.parameter(node) or f"folded {node.name}"
            exported.keep(node)
            self.tensors[name] = value
            with self.graph.inserting_after(self._last):
                self._last = self._placeholder(f"parameter_{len(self.tensors)}", node)
            return self._last
        for needed in node.all_input_nodes:
            self.copy(needed)
        if node.target is torch.ops.aten.as_strided.default:
            raise UnsupportedNetwork(f"as_strided in {exported.path(node) or 'its forward'}")
        copied = self.graph.node_copy(node, self.copy)
        if copied.target in _CONTIGUOUS:  # our maps are channels-last
            copied.target = torch.ops.aten.reshape.default
        return copied


def on_device(module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """Returns a program that computes on a device, wherever its network was when exported."""

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        node.args = map_aggregate(node.args, moved)
        node.kwargs = map_aggregate(node.kwargs, moved)
        if _makes_tensor(node.target):
            node.kwargs = {**node.kwargs, "device": device}
    return fx.GraphModule({}, graph)


def _makes_tensor(target: Any) -> bool:
    """Whether an operation makes a tensor of numbers, on a device that it is told."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    arguments = target._schema.arguments
    reads = any("Tensor" in str(argument.type) for argument in arguments)
    return not reads and any(argument.name == "device" for argument in arguments)


def read_by_host(module: fx.GraphModule) -> str | None:
    """Returns the operation of a program whose numbers the host has to read; None if none has."""
    for node in module.graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            continue
        if target.overloadpacket in _INDEXING:
            waits = any(_is_mask(index) for index in node.args[1])
        else:
            waits = bool(_READ_BY_HOST & {*target.tags})
        if waits:
            return str(target)
    return None


_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten._unsafe_index)
_READ_BY_HOST = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _is_mask(index: Any) -> bool:
    """Whether an index is a mask, whose elements are counted before anything is indexed."""
    value = index.meta.get("val") if isinstance(index, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


def trace(
    net: nn.Module,
    inputs: Sequence[Tensor | None],
    sizes: tuple[int, int] | None = None,
    runs: Callable[[Any], bool] | None = None,
) -> Traced:
    """Traces a network; see Exported.

    Args:
        runs: tells whether a back end has an operation; others are decomposed, as far as torch
            knows how. None for all operations.

    Raises:
        UnsupportedNetwork: torch cannot export the network.
    """
    program = _export(net, tuple(inputs), sizes)
    if runs is not None:
        program = _decomposed(program, runs)
    signature = program.graph_signature
    tensors = {**program.constants, **program.state_dict}
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    for name in names.values():
        if not isinstance(tensors[name], Tensor):
            raise UnsupportedNetwork(f"constants of type {type(tensors[name]).__name__}")
    (outputs,) = next(n for n in program.graph.nodes if n.op == "output").args
    if len(outputs) != 1 or not isinstance(outputs[0], fx.Node):
        raise UnsupportedNetwork(f"{len(outputs)} outputs; one tensor is expected")
    seen = [name for name in signature.user_inputs if isinstance(name, str)]
    return Traced(
        program.graph,
        {node: str(name) for node, name in names.items()},
        {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)},
        seen,
        outputs[0].name,
        frozenset((*signature.inputs_to_parameters, *signature.inputs_to_buffers)),
    )


def _export(
    net: nn.Module, inputs: tuple[Tensor | None, ...], sizes: tuple[int, int] | None
) -> torch.export.ExportedProgram:
    shapes: list[dict[int, Any] | None] = [
        {0: torch.export.Dim.AUTO} if x is not None and len(x) == PROBE else None for x in inputs
    ]
    if sizes is not None:
        (multiple, rest), image = sizes, inputs[0]
        assert image is not None
        most = _MOST // multiple
        for axis, name in ((2, "height"), (3, "width")):
            size = multiple * torch.export.Dim(name, max=most) + rest
            shapes[0] = {**(shapes[0] or {}), axis: size}
        image = image.new_zeros(*image.shape[:2], *(multiple * k + rest for k in _UNITS))
        inputs = (image, *inputs[1:])
    with torch.inference_mode(mode=False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _quiet():
                program = torch.export.export(
                    net, inputs, dynamic_shapes=tuple(shapes), strict=False
                )
            if any(_mutates(node) for node in program.graph.nodes):
                program = program.run_decompositions({})
        except Exception as error:  # of torch.export, or of the network's own forward
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            raise UnsupportedNetwork(
                f"a forward that torch.export does not take ({type(error).__name__}: "
                f"{reason.strip()[:200]})"
            ) from error
    return program


class _OtherThreads(io.TextIOBase):
    """Stream that takes what other threads write, and drops what this one does."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._silent = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._silent else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what torch.export prints of a network that it does not take off the terminal.

    It prints the graph so far, by its logs and to stderr; its error says what matters. One export
    at a time, for both belong to the process.
    """
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    with _ONE_EXPORT, contextlib.redirect_stderr(_OtherThreads(sys.stderr)):
        disabled, log.disabled = log.disabled, True
        try:
            yield
        finally:
            log.disabled = disabled


def _decomposed(
    program: torch.export.ExportedProgram, runs: Callable[[Any], bool]
) -> torch.export.ExportedProgram:
    """Returns a program in terms of operations that run, as far as torch knows how."""
    tried = set[Any]()
    while lacking := {target for target in _operations(program) if not runs(target)}:
        known = torch.export.default_decompositions()
        table = {target: known[target] for target in lacking - tried if target in known}
        if not table:
            break
        tried |= {*table}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = program.run_decompositions(table)
    return program


def _operations(program: torch.export.ExportedProgram) -> set[Any]:
    """Returns the operations that compute tensors from the inputs of a program."""
    of_inputs, found = set(program.graph_signature.user_inputs), set()
    for node in program.graph.nodes:
        if any(n.name in of_inputs for n in node.all_input_nodes):
            of_inputs.add(node.name)
            if isinstance(node.meta.get("val"), (Tensor, list, tuple)):
                found.add(node.target)
    return found


def _mutates(node: fx.Node) -> bool:
    """Whether a node writes into its argument, or holds a graph of its own."""
    if node.op == "get_attr":
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _needed(graph: fx.Graph, output: fx.Node) -> list[fx.Node]:
    """Returns the nodes that the output depends on, in order; sizes are no values of a tensor."""
    needed, pending = {output}, [output]
    while pending:
        for node in pending.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                pending.append(node)
    return [node for node in graph.nodes if node in needed]


def users(node: fx.Node, among: set[fx.Node]) -> list[fx.Node]:
    """Returns the nodes of a set that read a node."""
    return [user for user in node.users if user in among]

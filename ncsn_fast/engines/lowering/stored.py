"""Traced graphs of this package's networks as JSON, because torch.export takes seconds.

A graph is kept of networks whose modules are all this package's or torch's. Graphs of others are
traced in every process. A file that cannot be used is ignored, and written again. Graphs of the
models that ship lie in the package (`python -m tools.store_graphs` writes them): their first start
is no slower than later ones. engines/onnx/stored.py keeps its graphs here, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import operator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ncsn_fast.data import files
from ncsn_fast.data.json_file import find_json
from ncsn_fast.engines import installation
from ncsn_fast.engines.lowering.export import STAND_IN, Traced
from ncsn_fast.notices import notice

log = logging.getLogger(__name__)
_OURS = "ncsn_fast.models."
_MODULES = (_OURS, "torch.nn.modules.")
_OPERATORS = {
    f.__name__: f
    for f in (operator.getitem, operator.mul, operator.add, operator.sub, operator.floordiv)
}
_NAMESPACES = ("aten", "ncsn_fast")  # of the operations that a file may name
_KINDS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_MODULE_FIELDS = frozenset(vars(nn.Module()))
Structure = dict[str, Any]

SHIPPED = Path(__file__).parents[2] / "assets" / "graphs"
_known: dict[str, Structure] = {}  # what this process has read or written, by key


class NotStorable(Exception):
    """Error of a network or a graph that cannot be written to a file."""


def key(net: nn.Module, *facts: Any) -> str | None:
    """Returns the key of a network's graph; None for a network that others have a part in.

    It is a hash of every module's class and attributes, the sizes of its parameters, and the facts.
    What ships is of the package's version; what is in the cache, of this installation (`_path`).
    """
    if not type(net).__module__.startswith(_OURS):
        return None
    try:
        modules = [(name, *_about(module)) for name, module in net.named_modules()]
    except NotStorable:
        return None
    return _hash(*modules, *facts)


def read(key: str) -> Structure | None:
    """Returns the values kept under a key; None if there are none."""
    if key not in _known:
        found = _read_file(SHIPPED / f"{key}.json") or _read_file(_path(key))
        if found is None:
            return None
        _known[key] = found
    return _known[key]


def save(key: str, structure: Structure) -> None:
    """Keeps values under a key."""
    _known[key] = structure
    try:
        write(_path(key), structure)
    except OSError as error:
        notice(log, "%s; the network is traced again next time", error)


def find(key: str, net: nn.Module) -> Traced | None:
    """Returns the graph kept under a key, with a network's parameters; None if there is none."""
    structure = read(key)
    try:
        return None if structure is None else _restored(structure, net)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError):
        return None


def keep(key: str, traced: Traced) -> None:
    """Keeps a graph, if it can be."""
    with contextlib.suppress(NotStorable):
        save(key, structure_of(traced))


def write(path: Path, structure: Structure) -> None:
    """Writes a graph's file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as temporary:
        content = {"graph": structure, "digest": _digest(structure)}
        temporary.write_text(json.dumps(content) + "\n")


def structure_of(traced: Traced) -> Structure:
    """Returns a graph as plain data."""
    (size,) = (n.meta["val"].shape[0] for n in traced.graph.nodes if n.name == traced.inputs[0])
    if isinstance(size, int) or size.node.maybe_as_int() is not None:
        raise NotStorable  # one batch size only
    if {*traced.names} - traced.weights:
        raise NotStorable  # constants that lie in no parameter
    return {
        "names": traced.names,
        "inputs": traced.inputs,
        "output": traced.output,
        "nodes": [
            {
                "op": node.op,
                "name": node.name,
                "target": _target(node.target),
                "args": _written(node.args),
                "kwargs": _written(dict(node.kwargs)),
                "value": _value(node.meta.get("val"), size),
                "path": _module_path(node),
            }
            for node in traced.graph.nodes
            if node.op != "output"
        ],
    }


def _read_file(path: Path) -> Structure | None:
    """Returns the graph in a file; None if there is none, or another than was written."""
    found = find_json(path)
    if found is None or found.get("digest") != _digest(found.get("graph")):
        return None
    structure: Structure = found["graph"]
    return structure


def _path(key: str) -> Path:
    """Returns the file in the cache, which is of this installation and of this torch."""
    name = _hash(key, installation.digest(), torch.__version__)
    return files.cache_folder() / "graphs" / f"{name}.json"


def _hash(*facts: Any) -> str:
    return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()[:32]


def _digest(structure: Any) -> str:
    return hashlib.sha256(json.dumps(structure, sort_keys=True).encode()).hexdigest()


def _about(module: nn.Module) -> tuple[Any, ...]:
    """Returns what a module computes: its class, attributes, and sizes of its own tensors."""
    kind = type(module)
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    if not kind.__module__.startswith(_MODULES) or hooked:
        raise NotStorable
    plain = {k: _told(v) for k, v in vars(module).items() if k not in _MODULE_FIELDS}
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    sizes = [(name, tuple(tensor.shape)) for name, tensor in tensors]
    return kind.__module__, kind.__qualname__, sorted(plain.items()), sizes


def _told(value: Any) -> str:
    """Returns an attribute as text, in which no address is."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(_told, value))})"
    if isinstance(value, dict):
        return _told([*map(_told, value.items())])
    if isinstance(value, functools.partial):
        return _told((value.func, value.args, value.keywords))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return _told((type(value).__qualname__, fields))
    if callable(value) and hasattr(value, "__qualname__") and "<" not in value.__qualname__:
        return f"{value.__module__}.{value.__qualname__}"
    if type(value).__module__.startswith(_OURS) and not isinstance(value, nn.Module):
        return _told((type(value).__qualname__, vars(value)))
    raise NotStorable


def _target(target: Any) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return str(target)
    for name, function in _OPERATORS.items():
        if target is function:
            return f"operator.{name}"
    raise NotStorable


def _written(value: Any) -> Any:
    """Returns an argument of a node as plain data."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, (list, tuple)):
        name = "list" if isinstance(value, list) else "tuple"
        return {name: [_written(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": {k: _written(v) for k, v in value.items()}}
    if isinstance(value, torch.device) and value.index is None:
        return {"device": value.type}
    for name, kind in _KINDS.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise NotStorable


def _value(value: Any, size: Any) -> Any:
    """Returns the shape and type of a node's value as plain data; N is STAND_IN."""
    if isinstance(value, (list, tuple)):
        return [_value(v, size) for v in value]
    if isinstance(value, Tensor):
        first, rest = [_number(n, size) for n in value.shape[:1]], value.shape[1:]
        if not all(isinstance(n, int) for n in rest):
            raise NotStorable
        return {"shape": [*first, *rest], "dtype": str(value.dtype).removeprefix("torch.")}
    return None if value is None else _number(value, size)


def _number(value: Any, size: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return int(value.node.expr.subs(size.node.expr, STAND_IN))
    if type(value) not in (bool, int, float):
        raise NotStorable
    return value


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack.values()))[0]) if stack else ""


def _restored(structure: Structure, net: nn.Module) -> Traced:
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    for row in structure["nodes"]:
        args, kwargs = _read(row["args"], nodes), _read(row["kwargs"], nodes)
        target = row["target"] if row["op"] == "placeholder" else _resolved(row["target"])
        node = graph.create_node(row["op"], target, args, kwargs, row["name"])
        node.meta["val"] = _shaped(row["value"])
        if row["path"]:
            node.meta["nn_module_stack"] = {"": (row["path"], None)}
        if node.name != row["name"]:
            raise ValueError(f"{row['name']} is no name of a node")
        nodes[node.name] = node
    names = {str(node): str(name) for node, name in structure["names"].items()}
    own = {name: tensors[name] for name in names.values()}
    inputs, output = structure["inputs"], structure["output"]
    return Traced(graph, names, own, inputs, output, frozenset(names))


def _resolved(target: str) -> Any:
    namespace, name, *overload = target.split(".")
    if namespace == "operator" and not overload:
        return _OPERATORS[name]
    if namespace not in _NAMESPACES:
        raise ValueError(f"{target} is no operation of a graph")
    return getattr(getattr(getattr(torch.ops, namespace), name), *overload)


def _read(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](_read(v, nodes) for v in content)
    if kind == "dict":
        return {k: _read(v, nodes) for k, v in content.items()}
    if kind == "device":
        return torch.device(content)
    found = getattr(torch, content)
    if not isinstance(found, _KINDS[kind]):
        raise TypeError(f"torch.{content} is no {kind}")
    return found


def _shaped(value: Any) -> Any:
    if isinstance(value, list):
        return [_shaped(v) for v in value]
    if isinstance(value, dict):
        dtype = _read({"dtype": value["dtype"]}, {})
        return torch.empty(value["shape"], dtype=dtype, device="meta")
    return value

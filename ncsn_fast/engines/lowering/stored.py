"""Lowered graphs of this package's networks as JSON, because torch.export takes seconds.

A graph is kept where its operations hold nothing but numbers and parameters of the network, which
it names. Other graphs, and those of other networks, are lowered in every process. A file that
cannot be used is ignored, and written again. Graphs of the models that ship lie in the package
(`python -m tools.store_graphs` writes them): their first start is no slower than later ones.
engines/onnx/stored.py keeps its graphs here, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncsn_fast.data import files
from ncsn_fast.data.json_file import find_json
from ncsn_fast.engines import installation
from ncsn_fast.engines.lowering.graph import (
    ActivationSpec,
    AddSpec,
    AffineSpec,
    ConvolutionSpec,
    Graph,
    GroupNormSpec,
    Map,
    NormSpec,
    Op,
)
from ncsn_fast.models.refinenet import RefineNet
from ncsn_fast.models.unet import TimeUNet
from ncsn_fast.ops.extension import _C

log = logging.getLogger(__name__)
_SPECS = {
    kind.__name__: kind
    for kind in (
        ActivationSpec, AddSpec, AffineSpec, ConvolutionSpec, GroupNormSpec, NormSpec,
    )
}  # fmt: skip
_OURS = ("ncsn_fast.models.", "torch.nn.modules.")
Structure = dict[str, Any]

SHIPPED = Path(__file__).parents[2] / "assets" / "graphs"
_known: dict[str, Structure] = {}  # what this process has read or written, by key


def key(net: nn.Module, *facts: Any) -> str | None:
    """Returns the key of a network's graph; None for a network that others have a part in.

    It is a hash of the architecture, the facts and the version of this package.
    """
    if type(net) not in (RefineNet, TimeUNet) or not all(map(_is_plain, net.modules())):
        return None
    settings: list[Any] = []
    if isinstance(net, RefineNet):
        style = net.style
        settings = [
            net.arch, style.act_name, style.norm_name, style.n_levels, net.scale_input, net.channels
        ]  # fmt: skip
    return _hash(*settings, repr(net), _C.build_info()["version"], *facts)


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
        log.info("%s; the network is lowered again next time", error)


def find(key: str, net: nn.Module) -> Graph | None:
    """Returns the graph kept under a key, with a network's parameters; None if there is none."""
    structure = read(key)
    if structure is None:
        return None
    try:
        return _restored(structure, {**dict(net.named_parameters()), **dict(net.named_buffers())})
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def keep(key: str, graph: Graph, names: Mapping[int, str]) -> None:
    """Keeps a graph, if it can be; names are those of tensors by their id."""
    with contextlib.suppress(_NotStorable):
        save(key, structure_of(graph, names))


def write(path: Path, structure: Structure) -> None:
    """Writes a graph's file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as temporary:
        content = {"graph": structure, "digest": _digest(structure)}
        temporary.write_text(json.dumps(content) + "\n")


def _read_file(path: Path) -> Structure | None:
    """Returns the graph in a file; None if there is none, or another than was written."""
    found = find_json(path)
    if found is None or found.get("digest") != _digest(found.get("graph")):
        return None
    structure: Structure = found["graph"]
    return structure


class _NotStorable(Exception):
    """Error of a graph that cannot be written to a file."""


def _path(key: str) -> Path:
    """Returns the file in the cache, which is of this installation and of this torch."""
    name = _hash(key, installation.digest(), torch.__version__)
    return files.cache_folder() / "graphs" / f"{name}.json"


def _hash(*facts: Any) -> str:
    return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()[:32]


def _digest(structure: Any) -> str:
    return hashlib.sha256(json.dumps(structure, sort_keys=True).encode()).hexdigest()


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes what its class says, and the class is ours or torch's."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module).__module__.startswith(_OURS) and not hooked


def structure_of(graph: Graph, names: Mapping[int, str]) -> Structure:
    """Returns a graph as plain data; names are those of tensors by their id."""
    if graph.vectors or graph.parameters or graph.batch is not None:
        raise _NotStorable
    maps: dict[Map, int] = {graph.input: 0}
    for op in graph.ops:
        for y in op.outputs:
            maps.setdefault(y, len(maps))
    return {
        "maps": [[m.channels, m.height, m.width] for m in maps],
        "scale": graph.scale,
        "shift": graph.shift,
        "output": maps[graph.output],
        "kept": sorted(graph.kept),
        "ops": [
            {
                "kind": op.kind,
                "name": op.name,
                "inputs": [maps[x] for x in op.inputs],
                "outputs": [maps[y] for y in op.outputs],
                "overwrites": [[maps[y], maps[x]] for y, x in op.overwrites],
                "spec": _written(op.spec, names),
            }
            for op in graph.ops
        ],
    }


def _written(value: Any, names: Mapping[int, str]) -> Any:
    if isinstance(value, Tensor):
        if id(value) in names:
            return {"tensor": names[id(value)]}
        number = float(value.flatten()[0]) if value.numel() else 0.0
        if value.ndim == 1 and bool((value == number).all()):
            return {"fill": number, "size": len(value)}
        raise _NotStorable
    if type(value).__name__ in _SPECS:
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"spec": type(value).__name__, **{k: _written(v, names) for k, v in fields.items()}}
    if isinstance(value, tuple):
        return [_written(v, names) for v in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise _NotStorable


def _restored(structure: Structure, tensors: Mapping[str, Tensor]) -> Graph:
    maps = [Map(*size) for size in structure["maps"]]
    first = maps[0]
    graph = Graph(first.channels, first.height, first.width)
    graph.input, graph.output = first, maps[structure["output"]]
    graph.scale, graph.shift = structure["scale"], structure["shift"]
    graph.kept = frozenset(structure["kept"])
    for op in structure["ops"]:
        graph.ops.append(
            Op(
                op["kind"],
                op["name"],
                tuple(maps[i] for i in op["inputs"]),
                tuple(maps[i] for i in op["outputs"]),
                tuple((maps[y], maps[x]) for y, x in op["overwrites"]),
                _read(op["spec"], tensors),
            )
        )
    return graph


def _read(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return tuple(_read(v, tensors) for v in value)
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]].detach()
    if "fill" in value:
        return torch.full((value["size"],), value["fill"], dtype=torch.float32)
    fields = {k: _read(v, tensors) for k, v in value.items() if k != "spec"}
    return _SPECS[value["spec"]](**fields)

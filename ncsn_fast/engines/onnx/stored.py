"""ONNX graphs of this package's networks as JSON, because torch.export takes seconds.

A graph is kept without weights, which it names, beside those of lowering/stored.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.engines.lowering import stored
from ncsn_fast.engines.onnx.writer import Node, Writer
from ncsn_fast.models.score import ScoreModel

_KINDS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool,
)  # fmt: skip
_DTYPES = {str(dtype): dtype for dtype in _KINDS}


def key(model: ScoreModel, *facts: Any) -> str | None:
    """Returns the key of a model's graph; None for a network that others have a part in."""
    clock = None if model.clock is None else (model.clock.rate, model.clock.scale)
    ladder = model.sigmas.tolist() if model.conditional else None
    return stored.key(model.net, "ONNX", clock, ladder, *facts)


def find(key: str, model: ScoreModel, dtype: torch.dtype) -> Writer | None:
    """Returns the graph kept under a key, with a model's weights; None if there is none."""
    structure = stored.read(key)
    if structure is None:
        return None
    w, tensors = Writer(dtype), model.state_dict()
    try:
        w.nodes = [
            Node(kind, name, tuple(inputs), tuple(outputs), _attributes(given))
            for kind, name, inputs, outputs, given in structure["nodes"]
        ]
        w.constants = {
            name: _tensor(entry, tensors) for name, entry in structure["constants"].items()
        }
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None
    return w


def keep(key: str, w: Writer) -> None:
    """Keeps a graph, unless it holds numbers that were computed from weights."""
    if w.computed:
        return
    nodes = [[n.kind, n.name, n.inputs, n.outputs, _plain(n.attributes)] for n in w.nodes]
    stored.save(key, {"nodes": nodes, "constants": {c: _entry(w, c) for c in w.constants}})


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns attributes as JSON has them."""
    return {
        k: {"dtype": str(v)} if isinstance(v, torch.dtype) else v for k, v in attributes.items()
    }


def _attributes(given: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _DTYPES[v["dtype"]] if isinstance(v, dict) else v for k, v in given.items()}


def _entry(w: Writer, name: str) -> dict[str, Any]:
    tensor = w.constants[name]
    dtype = str(tensor.dtype)
    if name in w.parameters:
        return {"parameter": w.parameters[name], "dtype": dtype}
    return {"values": tensor.flatten().tolist(), "shape": list(tensor.shape), "dtype": dtype}


def _tensor(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    dtype = _DTYPES[entry["dtype"]]
    if "parameter" in entry:
        return tensors[entry["parameter"]].detach().to("cpu", dtype).contiguous()
    return torch.tensor(entry["values"], dtype=dtype).reshape(entry["shape"])

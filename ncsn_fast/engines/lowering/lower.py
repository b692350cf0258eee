"""Lowering: from any network that torch.export takes to the graph that the engines run."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ncsn_fast.engines.lowering import attention, passes, stored, sums
from ncsn_fast.engines.lowering.aten import Lowering
from ncsn_fast.engines.lowering.export import PROBE, Exported, Program
from ncsn_fast.engines.lowering.graph import Graph, Vector
from ncsn_fast.engines.lowering.handlers import HANDLERS
from ncsn_fast.engines.lowering.remembered import Remembered, tensors_of
from ncsn_fast.engines.lowering.rewriting import name_uniquely
from ncsn_fast.engines.lowering.transposed import expand_transposed

# In this order: what removes operations, then what joins them, then where they write.
PASSES: tuple[passes.Pass, ...] = (
    passes.drop_dead,
    passes.fold_input,
    passes.drop_identities,
    expand_transposed,
    passes.fold_affine,
    passes.absorb_vectors,
    passes.fold_padding,
    passes.pool_convolutions,
    passes.fuse_activations,
    attention.scale_softmax,
    attention.fuse_attention,
    passes.join_projections,
    sums.weigh_sums,
    sums.fuse_sums,
    sums.fuse_added_activations,
    passes.drop_dead,
    passes.reuse_memory,
)

Shape = tuple[int, int, int]


_Known = dict[Any, Remembered[Graph]]
_memory: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def lower(
    net: nn.Module,
    shape: Shape,
    conditions: Sequence[torch.dtype | None] = (),
    batch: int = PROBE,
) -> Graph:
    """Lowers a network net(x, *conditions) to a graph for images (C, H, W) of this shape.

    Graphs are remembered as long as the network lives and its parameters stay as they are.

    Args:
        conditions: dtypes of the network's further inputs, each (N,); None for an input of None.
        batch: number of images to export the network with; it matters for networks that run with
            one number only, which `Graph.batch` tells.

    Raises:
        UnsupportedNetwork: torch cannot export the network, or its output is no image of the shape.
    """
    tensors = [*tensors_of(net)]
    known = _memory.setdefault(net, {})
    key = (shape, tuple(conditions), batch)
    found = known.get(key)
    if found is None or not found.is_of(tensors):
        graph = _lower(net, shape, conditions, batch)
        found = known[key] = Remembered.of(graph, tensors)
    return found.value


def _is_plain(tensor: Tensor) -> bool:
    """Whether torch.export takes a tensor, and it is float32 as graphs are, if of any float."""
    wide = tensor.is_floating_point() and tensor.dtype is not torch.float32
    return not wide and not tensor.is_inference()


def _lower(
    net: nn.Module,
    shape: Shape,
    conditions: Sequence[torch.dtype | None],
    batch: int,
) -> Graph:
    exported = export(net, shape, conditions, batch)
    graph = Lowering(net, exported, shape, HANDLERS).run()
    passes.apply(graph, PASSES)
    name_uniquely(graph)
    _add_condition(graph, exported)
    graph.kept = frozenset(exported.kept)
    return graph


def export(
    net: nn.Module,
    shape: Shape,
    conditions: Sequence[torch.dtype | None] = (),
    batch: int = PROBE,
) -> Exported:
    """Exports a network; see `lower`. What torch.export finds is stored for some (stored.py)."""
    name = stored.key(net, shape, [*conditions], batch)
    if not all(map(_is_plain, tensors_of(net))):
        with torch.inference_mode(mode=False):
            net = copy.deepcopy(net).float()
    device = next(tensors_of(net), torch.empty(0)).device
    inputs: list[Tensor | None] = [torch.zeros(batch, *shape, dtype=torch.float32, device=device)]
    for dtype in conditions:
        row = None if dtype is None else torch.zeros(batch, dtype=dtype, device=device)
        inputs.append(row)
    traced = None if name is None else stored.find(name, net)
    if traced is not None:
        return Exported(net, inputs, traced=traced)
    training = [module for module in net.modules() if module.training]
    for module in training:
        module.training = False
    try:
        exported = Exported(net, inputs)
    finally:
        for module in training:
            module.training = True
    if name is not None:
        stored.keep(name, exported.traced)
    return exported


def _add_condition(graph: Graph, exported: Exported) -> None:
    """Makes a program of what the graph's vectors are computed from."""
    vectors = [*dict.fromkeys(v for op in graph.ops for v in vectors_of(op.spec))]
    if not vectors:
        return
    program = Program(exported, exported.inputs[1:])
    outputs = []
    for vector in vectors:
        rows = program.graph.call_function(
            torch.ops.aten.reshape.default, (program.copy(vector.value), [program.batch, -1])
        )
        outputs.append(
            program.graph.call_function(
                torch.ops.aten.expand.default, (rows, [program.batch, vector.channels])
            )
        )
    graph.condition = program.finish(outputs)
    graph.condition_parameters = program.parameters
    graph.parameters |= program.tensors
    graph.vectors = tuple(vectors)
    for vector in vectors:
        vector.value = None  # the exported network is not needed any more


def vectors_of(spec: Any) -> list[Vector]:
    """Returns the vectors that an operation reads."""
    if not dataclasses.is_dataclass(spec):
        return []
    found = []
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, Vector):
            found.append(value)
        elif isinstance(value, tuple):
            found += [v for v in value if isinstance(v, Vector)]
    return found

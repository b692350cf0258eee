"""Parts that passes over a graph share."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping

from ncsn_fast.engines.lowering.graph import (
    ActivationSpec,
    AddSpec,
    AttentionSpec,
    CopySpec,
    Graph,
    Map,
    Op,
    ProductSpec,
    TorchSpec,
    View,
)


def producers_of(graph: Graph) -> dict[Map, Op]:
    """Returns the operation that writes each map."""
    return {y: op for op in graph.ops for y in op.outputs}


def readers_of(graph: Graph) -> Counter[Map]:
    """Counts the readers of each map; the caller is one of the output's."""
    count = Counter(x for op in graph.ops for x in op.inputs)
    count[graph.output] += 1
    return count


def fold_one(graph: Graph, fold: Callable[[Op, Op], Op | None]) -> bool:
    """Replaces one pair of operations, of which only the second reads the first, by one."""
    producers, count = producers_of(graph), readers_of(graph)
    for i, op in enumerate(graph.ops):
        first = producers.get(op.inputs[0])
        if first is None or count[op.inputs[0]] > 1 or len(op.inputs) > 1:
            continue
        folded = fold(first, op)
        if folded is not None:
            graph.ops[i] = folded
            graph.ops.remove(first)
            return True
    return False


def fold_all(graph: Graph, fold: Callable[[Op, Op], Op | None]) -> None:
    """Repeats `fold_one` until no pair is left."""
    while fold_one(graph, fold):
        pass


def with_maps(op: Op, names: Mapping[Map, Map]) -> Op:
    """Returns an operation that reads and writes other maps."""
    if not names.keys() & {*op.inputs, *op.outputs}:
        return op

    def moved(view: View) -> View:
        return dataclasses.replace(view, map=names.get(view.map, view.map))

    spec = op.spec
    if isinstance(spec, AttentionSpec):
        q, k, v = map(moved, (spec.query, spec.key, spec.value))
        spec = AttentionSpec(q, k, v, spec.scale)
    elif isinstance(spec, ProductSpec):
        spec = ProductSpec(*map(moved, (spec.a, spec.b, spec.y)))
    elif isinstance(spec, CopySpec):
        spec = CopySpec(moved(spec.source), moved(spec.target))
    elif isinstance(spec, TorchSpec):
        inputs, outputs = (tuple(map(moved, views)) for views in (spec.inputs, spec.outputs))
        spec = dataclasses.replace(spec, inputs=inputs, outputs=outputs)
    read, written = (tuple(names.get(x, x) for x in maps) for maps in (op.inputs, op.outputs))
    return dataclasses.replace(op, inputs=read, outputs=written, spec=spec)


def overwrite_inputs(graph: Graph, kinds: Collection[str]) -> None:
    """Lets outputs of some kinds overwrite inputs that nothing reads afterwards."""
    last = {x: i for i, op in enumerate(graph.ops) for x in op.inputs}
    last[graph.input] = last[graph.output] = len(graph.ops)
    for i, op in enumerate(graph.ops):
        if op.kind not in kinds or op.overwrites:
            continue
        candidates = op.inputs[1:] if op.kind == "resize_add" else op.inputs
        free = [x for x in dict.fromkeys(candidates) if last[x] == i]
        pairs = tuple(zip(op.outputs, free, strict=False))
        graph.ops[i] = dataclasses.replace(op, overwrites=pairs)


def name_uniquely(graph: Graph) -> None:
    """Gives operations with parameters names of their own, under which plans keep these."""
    used = Counter[str]()
    for i, op in enumerate(graph.ops):
        if not op.spec or isinstance(op.spec, (AddSpec, ActivationSpec)):
            continue
        used[op.name] += 1
        if used[op.name] > 1:
            graph.ops[i] = dataclasses.replace(op, name=f"{op.name}#{used[op.name]}")

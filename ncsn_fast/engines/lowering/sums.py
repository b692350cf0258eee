"""Passes over the sums of a graph: weights, accumulation in place, activations that follow."""

from __future__ import annotations

import dataclasses

from ncsn_fast.engines.lowering.graph import (
    ACTIVATIONS,
    AddSpec,
    AffineSpec,
    Graph,
    Map,
    Op,
)
from ncsn_fast.engines.lowering.rewriting import fold_one, producers_of, readers_of


def weigh_sums(graph: Graph) -> None:
    """Makes numbers that a sum, or what is summed, is scaled by a part of the sum."""
    while fold_one(graph, _scaled_sum) or _weigh_one(graph):
        pass


def _scaled_sum(first: Op, op: Op) -> Op | None:
    spec = op.spec
    if first.kind != "add" or not isinstance(spec, AffineSpec) or spec.number is None:
        return None
    weights = first.spec if isinstance(first.spec, AddSpec) else AddSpec()
    weights = AddSpec(weights.a * spec.number, weights.b * spec.number)
    return dataclasses.replace(first, outputs=op.outputs, spec=weights)


def _weigh_one(graph: Graph) -> bool:
    """Folds one number by which a term of a sum is scaled."""
    producers, count = producers_of(graph), readers_of(graph)
    for i, op in enumerate(graph.ops):
        for side, x in enumerate(op.inputs if op.kind == "add" else ()):
            first = producers.get(x)
            spec = None if first is None or count[x] > 1 else first.spec
            if first is None or not isinstance(spec, AffineSpec) or spec.number is None:
                continue
            weights = op.spec if isinstance(op.spec, AddSpec) else AddSpec()
            pair = [weights.a, weights.b]
            pair[side] *= spec.number
            inputs = tuple(first.inputs[0] if y is x else y for y in op.inputs)
            graph.ops[i] = dataclasses.replace(op, inputs=inputs, spec=AddSpec(*pair))
            graph.ops.remove(first)
            return True
    return False


def fuse_sums(graph: Graph) -> None:
    """Accumulates convolutions and resizes in the sums that read them.

    Sums of sums are taken together: what convolutions compute for the sum alone is added to its
    destination when they run, the rest is added last, where an activation that follows joins. So
    (x + path1) + path2 becomes (x + path2) + path1 where path1 is read elsewhere too. The
    destination is a map that nothing else reads afterwards, or the convolution that is nearest to
    the input.
    """
    sums = _sums(graph)
    position = {id(op): i for i, op in enumerate(graph.ops)}
    for root, total in sums.items():
        for op in (*total.inner, *total.sinking):
            position[id(op)] = position[id(root)]
    inner = {id(op) for total in sums.values() for op in (*total.inner, *total.sinking)}
    depth = _depths(graph)
    ops: list[Op] = []
    placed: dict[int, list[Op]] = {}  # what is computed before an operation, by its id
    for root, total in sums.items():
        first, emitted = _accumulated(graph, root, total, position, depth)
        if first is not None:
            inner.discard(id(first))
        placed[id(root)] = emitted
    for op in graph.ops:
        if op in sums:
            ops += placed[id(op)]
        elif id(op) not in inner:
            ops.append(op)
    graph.ops = ops


@dataclasses.dataclass
class _Sum:
    """A sum of more than two maps, or of two: its terms, and the operations that it takes in."""

    terms: list[Map]
    inner: list[Op]  # sums within
    sinking: list[Op]  # convolutions and resizes of which it is the only reader


def _sums(graph: Graph) -> dict[Op, _Sum]:
    producers, count = producers_of(graph), readers_of(graph)
    within: set[int] = set()
    found: dict[Op, _Sum] = {}
    for root in reversed(graph.ops):
        if root.kind != "add" or root.spec is not None or id(root) in within:
            continue
        total = _Sum([], [], [])
        pending = [*root.inputs]
        while pending:
            x = pending.pop(0)
            producer = producers.get(x)
            alone = producer is not None and count[x] == 1
            is_sum = producer is not None and producer.kind == "add" and producer.spec is None
            if producer is not None and alone and is_sum:
                total.inner.append(producer)
                within.add(id(producer))
                pending = [*producer.inputs, *pending]
                continue
            total.terms.append(x)
            if producer is not None and alone and _accumulates(producer):
                total.sinking.append(producer)
        found[root] = total
    return dict(reversed(found.items()))


def _accumulates(op: Op) -> bool:
    return op.kind == "resize" or (op.kind == "conv" and len(op.inputs) == 1)


def _accumulated(
    graph: Graph, root: Op, total: _Sum, position: dict[int, int], depth: dict[Map, int]
) -> tuple[Op | None, list[Op]]:
    """Returns the convolution that stays where it is, if any, and what the sum consists of."""
    sinking = {op.outputs[0]: op for op in total.sinking}
    others = [x for x in total.terms if x not in sinking]
    at = position[id(root)]
    last = {graph.output: len(graph.ops), graph.input: len(graph.ops)}
    for op in graph.ops:
        if op is not root and op not in total.inner:
            for x in op.inputs:
                last[x] = max(last.get(x, -1), position[id(op)])
    free = [x for x in others if last.get(x, -1) < at and others.count(x) == 1]
    convolutions = [x for x, op in sinking.items() if op.kind == "conv"]
    stays: Op | None = None
    ops: list[Op] = []
    if sinking and free:
        base = free[0]
        others.remove(base)
    elif convolutions:
        base = min(convolutions, key=depth.__getitem__)
        stays = sinking.pop(base)
    else:  # resizes, and nothing that they could be added to
        ops += sinking.values()
        others += sinking
        sinking, base = {}, others.pop(0)
    for x, op in sorted(sinking.items(), key=lambda item: depth[item[0]]):
        y = dataclasses.replace(x)
        kind = "resize_add" if op.kind == "resize" else op.kind
        ops.append(Op(kind, op.name, (*op.inputs, base), (y,), ((y, base),), op.spec))
        base = y
    for x in others:
        y = dataclasses.replace(base)
        ops.append(Op("add", root.name, (base, x), (y,)))
        base = y
    ops[-1] = _with_output(ops[-1], root.outputs[0])
    return stays, ops


def _with_output(op: Op, y: Map) -> Op:
    pairs = tuple((y, x) for _, x in op.overwrites)
    return dataclasses.replace(op, outputs=(y,), overwrites=pairs)


def fuse_added_activations(graph: Graph) -> None:
    """Makes an activation a part of the sum right before it."""
    count, ops = readers_of(graph), list[Op]()
    for op in graph.ops:
        before = ops[-1] if ops else None
        plain = op.kind in ACTIVATIONS and op.spec is None
        if before is None or not plain or before.kind != "add" or before.outputs != op.inputs:
            ops.append(op)
            continue
        total = before.outputs if count[before.outputs[0]] > 1 else ()
        both = (*total, *op.outputs)
        ops[-1] = Op(f"add_{op.kind}", op.name, before.inputs, both, spec=before.spec)
    graph.ops = ops


def _depths(graph: Graph) -> dict[Map, int]:
    """Returns the number of operations on the longest way from the input to each map."""
    depth = {graph.input: 0}
    for op in graph.ops:
        longest = 1 + max((depth.get(x, 0) for x in op.inputs), default=0)
        depth.update(dict.fromkeys(op.outputs, longest))
    return depth

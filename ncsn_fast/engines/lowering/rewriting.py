"""Parts that passes over a graph share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from ncsn_fast.engines.lowering.graph import (
    Graph,
    Map,
    Op,
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

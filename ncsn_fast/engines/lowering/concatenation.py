"""Concatenations whose operands are written where they belong, without a copy."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator

from ncsn_fast.engines.lowering.graph import Graph, Map, Op, Slice
from ncsn_fast.engines.lowering.rewriting import producers_of, readers_of


def write_in_place(graph: Graph, writes: Callable[[Op], bool]) -> Graph:
    """Returns an equivalent graph in which operands of concatenations are slices of their results.

    An operand is one where nothing but the concatenation reads it, and the kernel of the operation
    that computes it can skip the channels of the others. A map that anything else reads stays as it
    is, because convolutions of libraries would copy it. The concatenation copies what is left, and
    is removed where nothing is. What computes a slice overwrites no input: the memory of a map that
    it adds to has no gaps.

    Args:
        writes: whether the kernel of an operation can write its only output as a slice.
    """
    producers, count = producers_of(graph), readers_of(graph)
    placed, slices = copy.copy(graph), dict[Map, Slice]()
    for op in graph.ops:
        for x, place in _operands(op):
            producer = producers.get(x)
            alone = producer is not None and count[x] == 1 and producer.outputs == (x,)
            if producer is not None and alone and writes(producer):
                slices[x] = place
    placed.slices, placed.ops = slices, []
    for op in graph.ops:
        if op.kind == "concat" and slices.keys() >= {*op.inputs}:
            continue
        written = op.outputs[0] in slices
        placed.ops.append(dataclasses.replace(op, overwrites=()) if written else op)
    return placed


def _operands(op: Op) -> Iterator[tuple[Map, Slice]]:
    """Yields the maps that an operation concatenates, and where they belong."""
    first = 0
    for x in op.inputs if op.kind == "concat" else ():
        yield x, Slice(op.outputs[0], first)
        first += x.channels

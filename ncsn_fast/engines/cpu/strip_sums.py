"""Statistics of norms, by the convolutions in tiles that write what they read."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable

from ncsn_fast.engines.lowering.graph import ConvolutionSpec, Graph, Map, Op
from ncsn_fast.ops.tiles import Strips

_NORMS = ("norm", "group_norm")


@dataclasses.dataclass(eq=False)
class StripSums(Map):
    """Sums of a map over strips of rows, of which a norm computes its statistics.

    Float32, each in the place of two bfloat16 elements; csrc/include/ncsn_fast/strip_sums.h has
    the layout.
    """

    @classmethod
    def of(cls, y: Map) -> StripSums:
        """Returns those of a map."""
        _, strips, sums, channels = Strips.of(y.height, y.width).sums_shape(1, y.channels)
        return cls(2 * sums * channels, strips, 1)


def sums_among(maps: Iterable[Map]) -> StripSums | None:
    """Returns the sums among the maps that an operation reads or writes."""
    return next((m for m in maps if isinstance(m, StripSums)), None)


def read_by_norms(graph: Graph) -> set[Map]:
    """Returns the maps whose statistics a norm needs."""
    return {op.inputs[0] for op in graph.ops if op.kind in _NORMS}


def with_strip_sums(graph: Graph, in_tiles: Callable[[Op, ConvolutionSpec], bool]) -> Graph:
    """Returns an equivalent graph in which norms need not read their map for its statistics.

    A convolution in tiles whose sum a norm reads has one output more, and the norm one input.

    Args:
        in_tiles: whether a convolution runs in tiles.
    """
    wanted = read_by_norms(graph)
    found: dict[Map, StripSums] = {}
    result = copy.copy(graph)
    result.ops = []
    for op in graph.ops:
        y = op.outputs[0]
        if y in wanted and isinstance(op.spec, ConvolutionSpec) and in_tiles(op, op.spec):
            if not op.spec.activation or len(op.outputs) > 1:  # else y is no sum
                found[y] = StripSums.of(y)
                op = dataclasses.replace(op, outputs=(*op.outputs, found[y]))
        elif op.kind in _NORMS and op.inputs[0] in found:
            op = dataclasses.replace(op, inputs=(*op.inputs, found[op.inputs[0]]))
        result.ops.append(op)
    return result

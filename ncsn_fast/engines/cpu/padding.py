"""Maps with zeros around every image, which convolutions in tiles read where they lie."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

from ncsn_fast.engines.cpu.strip_sums import StripSums
from ncsn_fast.engines.lowering.graph import ACTIVATIONS, ConvolutionSpec, Graph, Map, Op
from ncsn_fast.ops.addresses import DENSE
from ncsn_fast.ops.tiles import PaddedLayout

_WRITERS = (
    "norm", "group_norm", "max_pool5", "avg_pool5", "add",
    *(f"add_{name}" for name in ACTIVATIONS), *ACTIVATIONS,
)  # fmt: skip


@dataclasses.dataclass(eq=False)
class PaddedMap(Map):
    """A map with `border` pixels of zeros around every image, in bfloat16."""

    border: int = 0

    def layout(self, batch: int) -> PaddedLayout:
        return PaddedLayout.of(batch, self.height, self.width, self.channels, self.border)

    def elements(self, batch: int) -> int:
        return self.layout(batch).elements


def border_of(x: Map) -> int:
    """Returns the zeros around a map as kernels take it."""
    return x.border if isinstance(x, PaddedMap) else DENSE


def with_padding(graph: Graph, in_tiles: Callable[[Op, ConvolutionSpec], bool]) -> Graph:
    """Returns an equivalent graph that pads maps where they are written.

    These are the maps that only convolutions in tiles read, and that a kernel writes which can.
    Convolutions copy the others into rows with padding themselves.

    Args:
        in_tiles: whether a convolution runs in tiles.
    """
    borders: dict[Map, int] = {}  # of maps that have been read by nothing else
    others = {graph.input, graph.output}
    for op in graph.ops:
        convolves = isinstance(op.spec, ConvolutionSpec) and in_tiles(op, op.spec)
        for i, x in enumerate(op.inputs):
            if convolves and i == 0:
                borders[x] = max(borders.get(x, 0), _reach(op, x))
            else:
                others.add(x)
    padded: dict[Map, PaddedMap] = {}
    for op in graph.ops:
        y = next(y for y in reversed(op.outputs) if not isinstance(y, StripSums))
        if y in borders and y not in others and _can_pad(op, in_tiles):
            padded[y] = PaddedMap(y.channels, y.height, y.width, borders[y])
    result = copy.copy(graph)
    result.ops = [_replaced(op, padded) for op in graph.ops]
    return result


def _reach(op: Op, x: Map) -> int:
    """Returns how many pixels beyond the map a convolution reads."""
    assert isinstance(op.spec, ConvolutionSpec)
    return op.spec.taps // 2 * min(op.spec.dilation, max(x.height, x.width))


def _can_pad(op: Op, in_tiles: Callable[[Op, ConvolutionSpec], bool]) -> bool:
    """Whether an operation's last map can be padded by the kernel that writes it."""
    if isinstance(op.spec, ConvolutionSpec):
        return in_tiles(op, op.spec)
    return op.kind in _WRITERS and (op.kind not in ACTIVATIONS or op.spec is None)


def _replaced(op: Op, padded: dict[Map, PaddedMap]) -> Op:
    """Returns an operation that reads and writes padded maps, which overwrite nothing."""
    return dataclasses.replace(
        op,
        inputs=tuple(padded.get(x, x) for x in op.inputs),
        outputs=tuple(padded.get(y, y) for y in op.outputs),
        overwrites=tuple((y, x) for y, x in op.overwrites if y not in padded),
    )

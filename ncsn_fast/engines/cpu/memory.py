"""Memory of a plan for the CPU: addresses in it, and the C++ steps that get them."""

from __future__ import annotations

import torch
from torch import Tensor

from ncsn_fast.engines.cpu import onednn
from ncsn_fast.engines.cpu.padding import PaddedMap
from ncsn_fast.engines.lowering import torch_steps
from ncsn_fast.engines.lowering.graph import Graph, Map, Op
from ncsn_fast.engines.lowering.memory_plan import aligned
from ncsn_fast.engines.lowering.static_memory import StaticMemory, Weights
from ncsn_fast.ops.addresses import NHWC, Array, PixelRows, array, part
from ncsn_fast.ops.extension import _C


class PlanMemory(StaticMemory):
    """Memory of a graph's maps, and its list of C++ steps; convolutions' weights are packed.

    Attributes:
        converts: whether oneDNN has no products in the maps' type on this machine, so that it gets
            copies of the maps in float32.
    """

    def __init__(
        self, graph: Graph, batch: int, dtype: torch.dtype, weights: Weights | None = None
    ) -> None:
        super().__init__(graph, batch, dtype, weights)
        self.bfloat16 = dtype is torch.bfloat16
        self._by_level = self._in_torch = False
        self._scratch: dict[tuple[int, ...], Tensor] = {}
        self.converts = onednn.lacks(dtype) is not None
        if self.converts:
            self.arithmetic = torch.float32
        self._wide: dict[str, Tensor] = {}
        self.steps = _C.Plan(*onednn.addresses())

    def in_torch(self, op: Op) -> None:
        """Adds a step that PyTorch runs."""
        self.steps.callback(torch_steps.step(self, op))
        self._in_torch = True

    @property
    def map_bytes(self) -> int:
        """Bytes of the feature-map buffer and the auxiliary buffers."""
        own = (*self._scratch.values(), *self._wide.values())
        return super().map_bytes + sum(t.nbytes for t in own)

    def tensor(self, x: Map) -> Tensor:
        if not isinstance(x, PaddedMap):
            return super().tensor(x)
        return x.layout(self.batch).pixels(self._flat(x), self.shape(x))

    def wide(self, x: Map, role: str) -> Tensor:
        """Returns memory for a map in float32, free between two operations; one for each role."""
        if role not in self._wide:
            maps = (m for op in self.graph.ops for m in (*op.inputs, *op.outputs))
            size = max(map(self.count, maps)) * torch.float32.itemsize
            self._wide[role] = aligned(size)[:size].view(torch.float32)
        n, c, h, w = self.shape(x)
        return self._wide[role].as_strided((n, c, h, w), (h * w * c, 1, w * c, c))

    def widen(self, x: Map, to: Tensor) -> None:
        """Adds a step that copies a map to memory of `wide`."""
        self._convert(x, self.array(x), array("map", to, tuple(to.shape), to.dtype, layout=NHWC))

    def narrow(self, y: Map, source: Tensor) -> None:
        """Adds a step that rounds memory of `wide` to a map."""
        wide = array("map", source, tuple(source.shape), source.dtype, layout=NHWC)
        self._convert(y, wide, self.array(y), narrows=True)

    def _convert(self, x: Map, source: Array, target: Array, *, narrows: bool = False) -> None:
        n, c, h, w = self.shape(x)
        self.steps.copy_channels(source, target, n * h * w, c, c, 0, c, 0, not narrows, narrows)

    def copy(self, x: Map, y: Map) -> None:
        """Adds a step that copies a map."""
        count = self.bytes(x) // self.dtype.itemsize
        self.steps.copy_channels(
            self.array(x), self.array(y), 1, count, count, 0, count, 0, self.bfloat16, self.bfloat16
        )

    def scratch(self, *shape: int) -> Tensor:
        """Returns memory in the maps' type that is free between two operations."""
        if shape not in self._scratch:
            self._scratch[shape] = torch.zeros(shape, dtype=self.dtype)
        return self._scratch[shape]

    def level_rows(self, table: Tensor, channels: int) -> list[Tensor]:
        """Returns memory for alpha, gamma and beta (batch, C) of each image's level."""
        shape = (self.batch, channels)
        rows = [self.new_rows(channels) for _ in range(3)]
        self._by_level = True
        self.steps.level_parameters(
            array("table", table, (len(table), 3 * channels), torch.float32), len(table), *shape,
            *(array("parameters of a norm", row, shape, torch.float32) for row in rows),
        )  # fmt: skip
        return rows

    def nhwc(self, x: Map) -> tuple[int, int, int, int]:
        return self.batch, x.height, x.width, x.channels

    def target(self, y: Map) -> Array | PixelRows:
        """Returns the memory of a map that a kernel writes, which may be a slice of another."""
        if (within := self.graph.slices.get(y)) is None:
            return self.array(y)
        row = within.whole.channels
        n, c, height, width = self.shape(y)
        size = ((n * height * width - 1) * row + c) * self.dtype.itemsize
        return (*part(self._buffer, self._offsets[y], size), row)

    def pixels(self, x: Map) -> tuple[int, int]:
        """Returns the pixels of a map, and the channels of each."""
        return self.batch * x.height * x.width, x.channels

    def array(self, x: Map, offset: int = 0) -> Array:
        """Returns the memory of a map, from an element of the first image."""
        assert x not in self.graph.slices, "a slice has gaps between its pixels"
        skipped = offset * self.dtype.itemsize
        return part(self._buffer, self._offsets[x] + skipped, self.bytes(x) - skipped)

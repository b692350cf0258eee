"""Memory of a plan for the CPU: maps, weights, and the steps that get their addresses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ncsn_fast.engines.cpu import onednn
from ncsn_fast.engines.lowering.graph import Graph, Map, Vector, View
from ncsn_fast.engines.lowering.memory_plan import aligned, plan_memory
from ncsn_fast.ops.addresses import Array, array, part
from ncsn_fast.ops.extension import _C

# Weights by operation name: a convolution's weight in oneDNN's packed layout (the same for every
# batch size) and bias, a norm's parameters, or what PyTorch's operations read.
Weights = dict[str, list[Tensor]]


class PlanMemory:
    """Memory of a graph's maps for `batch` images in one dtype, and its list of C++ steps.

    Args:
        weights: weights of another plan of the same network and dtype, to share.
    """

    def __init__(
        self, graph: Graph, batch: int, dtype: torch.dtype, weights: Weights | None = None
    ) -> None:
        if graph.batch not in (None, batch):
            raise ValueError(f"lowered for {graph.batch} images; got a batch of {batch}")
        self.graph, self.batch, self.dtype = graph, batch, dtype
        self.weights: Weights = {} if weights is None else weights
        self.bfloat16 = dtype is torch.bfloat16
        self._offsets, size = plan_memory(graph, batch, dtype.itemsize)
        self._buffer = aligned(size)
        self._rows: list[Tensor] = []  # parameters of each image
        self._by_level = self._in_torch = False
        self._vectors: dict[tuple[Vector, int], Tensor] = {}
        self._scratch: dict[tuple[int, ...], Tensor] = {}
        self.steps = _C.Plan(*onednn.addresses())

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and parameters, shared between plans."""
        return sum(t.numel() * t.element_size() for ts in self.weights.values() for t in ts)

    @property
    def map_bytes(self) -> int:
        """Bytes of the feature-map buffer and the auxiliary buffers."""
        more = (*self._rows, *self._vectors.values(), *self._scratch.values())
        return sum(t.nbytes for t in (self._buffer, *more))

    def tensor(self, x: Map) -> Tensor:
        """Returns a map as a (batch, C, H, W) channels-last view of the buffer."""
        n, c, h, w = self._shape(x)
        flat = self._buffer[self._offsets[x] :].view(self.dtype)
        return flat.as_strided((n, c, h, w), (h * w * c, 1, w * c, c))

    def _shape(self, x: Map) -> tuple[int, int, int, int]:
        return self.batch, x.channels, x.height, x.width

    def _bytes(self, x: Map) -> int:
        return math.prod(self._shape(x)) * self.dtype.itemsize

    def view(self, view: View) -> Tensor:
        """Returns a view of a map as a (batch, ...) tensor in the buffer."""
        flat = self._buffer[self._offsets[view.map] :]
        flat = flat[: self._bytes(view.map)].view(self.dtype)
        strides = (view.map.numel, *view.strides)
        first = int(flat.storage_offset()) + view.offset
        return flat.as_strided((self.batch, *view.shape), strides, first)

    def callback(self, step: Callable[[], object]) -> None:
        """Adds a step that PyTorch runs."""
        self.steps.callback(step)
        self._in_torch = True

    def copy(self, x: Map, y: Map) -> None:
        """Adds a step that copies a map."""
        count = self.count(x)
        self.steps.copy_channels(
            self.array(x), self.array(y), 1, count, count, 0, count, 0, self.bfloat16, self.bfloat16
        )

    def vector(self, vector: Vector, *, less: int = 0) -> Tensor:
        """Returns the memory (batch, C) of numbers that `set_conditions` computes, minus `less`."""
        rows = torch.zeros(self.batch, vector.channels, dtype=torch.float32)
        return self._vectors.setdefault((vector, less), rows)

    def own(self, tensor: Tensor) -> Tensor:
        """Keeps a tensor as long as the plan."""
        self._rows.append(tensor)
        return tensor

    def scratch(self, *shape: int) -> Tensor:
        """Returns memory in the maps' type that is free between two operations."""
        if shape not in self._scratch:
            self._scratch[shape] = torch.zeros(shape, dtype=self.dtype)
        return self._scratch[shape]

    def level_rows(self, table: Tensor, channels: int) -> list[Tensor]:
        """Returns memory for alpha, gamma and beta (batch, C) of each image's level."""
        shape = (self.batch, channels)
        rows = [self.own(torch.zeros(shape, dtype=torch.float32)) for _ in range(3)]
        self._by_level = True
        self.steps.level_parameters(
            array("table", table, (len(table), 3 * channels), torch.float32), len(table), *shape,
            *(array("parameters of a norm", row, shape, torch.float32) for row in rows),
        )  # fmt: skip
        return rows

    def constant(self, name: str) -> Tensor:
        """Returns a tensor that programs read; floating-point ones in float32."""
        key = f"{name} (constant)"
        if key not in self.weights:
            tensor = self.graph.parameters[name].detach()
            kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
            self.weights[key] = [tensor.to("cpu", kind, copy=True)]
        return self.weights[key][0]

    def float32(self, key: str, *tensors: Tensor) -> list[Tensor]:
        """Returns float32 copies of an operation's parameters."""
        if key not in self.weights:
            self.weights[key] = [
                t.detach().to("cpu", torch.float32, copy=True).contiguous() for t in tensors
            ]
        return self.weights[key]

    def plain(self, key: str, *tensors: Tensor | None) -> list[Tensor]:
        """Returns copies of weights in the maps' type, channels-last; None is left out."""
        if key not in self.weights:
            copies = [t.detach().to("cpu", self.dtype, copy=True) for t in tensors if t is not None]
            self.weights[key] = [
                t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t.contiguous()
                for t in copies
            ]
        return self.weights[key]

    def count(self, x: Map) -> int:
        """Returns the elements of a map."""
        return math.prod(self._shape(x))

    def nhwc(self, x: Map) -> tuple[int, int, int, int]:
        return self.batch, x.height, x.width, x.channels

    def array(self, x: Map, offset: int = 0) -> Array:
        """Returns the memory of a map, from an element of the first image."""
        skipped = offset * self.dtype.itemsize
        return part(self._buffer, self._offsets[x] + skipped, self._bytes(x) - skipped)

"""Memory of a plan: all maps in one buffer, weights, and rows that depend on the conditions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncsn_fast.engines.lowering.export import on_device
from ncsn_fast.engines.lowering.graph import Graph, Map, Vector, View
from ncsn_fast.engines.lowering.memory_plan import aligned, plan_memory

# Weights by the name of their operation, in the layout that its kernel reads.
Weights = dict[str, list[Tensor]]
CPU = torch.device("cpu")


def network_input(x: Tensor, scale: float, shift: float) -> Tensor:
    """Returns scale x + shift, with the bits that a sampler update gives a network's next input.

    Updates round once, by a fused multiply-add of float32. Float64 holds the product exactly.
    """
    scale, shift = torch.tensor([scale, shift], dtype=torch.float32).tolist()
    return x if (scale, shift) == (1.0, 0.0) else (x.double() * scale + shift).float()


class StaticMemory:
    """Memory of a graph's maps for `batch` images in one dtype, at addresses that never change.

    Args:
        weights: weights of another plan of the same network and dtype, to share; missing ones are
            copied from the network.

    Attributes:
        arithmetic: type in which libraries multiply maps: the maps' own, or a wider one.
    """

    def __init__(
        self,
        graph: Graph,
        batch: int,
        dtype: torch.dtype,
        weights: Weights | None = None,
        device: torch.device = CPU,
    ) -> None:
        if graph.batch not in (None, batch):
            raise ValueError(f"lowered for {graph.batch} images; got a batch of {batch}")
        self.graph, self.batch, self.dtype, self.device = graph, batch, dtype, device
        self.arithmetic = dtype
        self.weights: Weights = {} if weights is None else weights
        self._offsets, size = plan_memory(graph, batch, dtype.itemsize)
        self._buffer = aligned(size, device)
        self._owned: list[Tensor] = []
        self._vectors: list[tuple[Vector, float | Tensor, Tensor]] = []
        self._known: dict[tuple[Vector, float] | None, Tensor] = {}
        self._condition = None if graph.condition is None else on_device(graph.condition, device)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and parameters, shared between plans."""
        return sum(t.numel() * t.element_size() for ts in self.weights.values() for t in ts)

    @property
    def map_bytes(self) -> int:
        """Bytes of the feature-map buffer and the auxiliary buffers."""
        return sum(t.nbytes for t in (self._buffer, *self._owned))

    def tensor(self, x: Map) -> Tensor:
        """Returns a map as a (batch, C, H, W) channels-last view of the buffer."""
        n, c, h, w = self.shape(x)
        return self._flat(x).as_strided((n, c, h, w), (h * w * c, 1, w * c, c))

    def view(self, view: View) -> Tensor:
        """Returns a view of a map as a (batch, ...) tensor in the buffer."""
        flat = self._flat(view.map)
        strides = (view.map.numel, *view.strides)
        first = int(flat.storage_offset()) + view.offset
        return flat.as_strided((self.batch, *view.shape), strides, first)

    def shape(self, x: Map) -> tuple[int, int, int, int]:
        return self.batch, x.channels, x.height, x.width

    def count(self, x: Map) -> int:
        """Returns the elements of a map."""
        return math.prod(self.shape(x))

    def bytes(self, x: Map) -> int:
        return x.elements(self.batch) * self.dtype.itemsize

    def _flat(self, x: Map) -> Tensor:
        assert x not in self.graph.slices, "a slice has gaps between its pixels"
        first = self._offsets[x]
        return self._buffer[first : first + self.bytes(x)].view(self.dtype)

    def own(self, tensor: Tensor) -> Tensor:
        """Keeps a tensor as long as the plan."""
        self._owned.append(tensor)
        return tensor

    def new_rows(self, *shape: int) -> Tensor:
        """Allocates numbers (batch, *shape) that belong to the images."""
        return self.own(torch.zeros(self.batch, *shape, dtype=torch.float32, device=self.device))

    def vector(
        self, vector: Vector, *, plus: float | Tensor = 0.0, into: Tensor | None = None
    ) -> Tensor:
        """Returns the memory (batch, C) that `set_vectors` sets to a vector plus a number or (C,).

        into: that memory. None allocates it, one for all that read the same numbers.
        """
        key = (vector, plus) if into is None and isinstance(plus, float) else None
        if key in self._known:
            return self._known[key]
        into = self.new_rows(vector.channels) if into is None else into
        if key is not None:
            self._known[key] = into
        self._vectors.append((vector, plus, into))
        return into

    def set_vectors(self, *conditions: Tensor) -> None:
        """Computes what depends on the network's conditions only, (batch,) each, in float32."""
        if self._condition is None or not self._vectors:
            return
        parameters = [self.constant(name) for name in self.graph.condition_parameters]
        rows = self._condition(self.batch, *conditions, *parameters)
        found = dict(zip(self.graph.vectors, rows, strict=True))
        for vector, plus, target in self._vectors:
            torch.add(found[vector], plus, out=target)

    def constant(self, name: str) -> Tensor:
        """Returns a tensor that programs read; floating-point ones in float32."""
        key = f"{name} (constant)"
        if key not in self.weights:
            tensor = self.graph.parameters[name].detach()
            kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
            self.weights[key] = [tensor.to(self.device, kind, copy=True)]
        return self.weights[key][0]

    def float32(self, key: str, *tensors: Tensor) -> list[Tensor]:
        """Returns float32 copies of an operation's parameters."""
        if key not in self.weights:
            self.weights[key] = [
                t.detach().to(self.device, torch.float32, copy=True).contiguous() for t in tensors
            ]
        return self.weights[key]

    def plain(self, key: str, *tensors: Tensor | None) -> list[Tensor]:
        """Returns copies of weights for products with maps, channels-last; None is left out."""
        if key not in self.weights:
            given = [t.detach() for t in tensors if t is not None]
            copies = [t.to(self.device, self.arithmetic, copy=True) for t in given]
            self.weights[key] = [
                t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t.contiguous()
                for t in copies
            ]
        return self.weights[key]

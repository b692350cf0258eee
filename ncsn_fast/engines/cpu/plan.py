"""Plan of a network for the CPU: packed weights, one buffer for all feature maps, C++ steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from ncsn_fast.engines.cpu import onednn, steps
from ncsn_fast.engines.lowering.graph import ConvolutionSpec, Graph, Map, Op, Vector, View
from ncsn_fast.engines.lowering.memory_plan import OpCost, aligned, plan_memory
from ncsn_fast.ops.addresses import NONE, Array, array, part
from ncsn_fast.ops.cpu import WinogradWeights, winograd_pack, winograd_pays
from ncsn_fast.ops.extension import _C, forced_isa

# Weights by operation name: a convolution's weight in oneDNN's packed layout (the same for every
# batch size) and bias, a norm's parameters, or what PyTorch's operations read.
Weights = dict[str, list[Tensor]]


class CpuPlan:
    """A graph ready to run on `batch` images in one dtype.

    Args:
        weights: weights of another plan of the same network and dtype, to share; missing ones are
            copied from the network and packed.
        winograd: names of the convolutions that run by Winograd's algorithm; True for all where it
            pays.

    Attributes:
        input, output: (batch, C, H, W) channels-last, in the plan's buffer; valid between two runs.
        costs: kind, shape, FLOP and bytes of each step.
    """

    def __init__(
        self,
        graph: Graph,
        batch: int,
        dtype: torch.dtype,
        weights: Weights | None = None,
        *,
        winograd: Collection[str] | bool = False,
    ) -> None:
        self.graph, self.batch, self.dtype, self.winograd = graph, batch, dtype, winograd
        self.weights: Weights = {} if weights is None else weights
        self.bfloat16 = dtype is torch.bfloat16
        self._offsets, size = plan_memory(graph, batch, dtype.itemsize)
        self._buffer = aligned(size)
        self.input, self.output = self.tensor(graph.input), self.tensor(graph.output)
        self._input = torch.empty(self.input.shape, dtype=torch.float32)  # before rounding
        self._rows: list[Tensor] = []  # parameters of each image's level
        self._by_level = False
        self._vectors: dict[tuple[Vector, int], Tensor] = {}
        self.steps = _C.Plan(*onednn.addresses())
        self._spans: list[int] = []  # steps of each operation
        self.costs = [self._add(op) for op in graph.ops]

    def load(self, x: Tensor) -> None:
        """Sets input = scale * x + shift, computed in float32 as in the sampler update."""
        scale, shift = self.graph.scale, self.graph.shift
        self.input.copy_(torch.mul(x, scale, out=self._input).add_(shift))

    def run(self) -> None:
        """Computes `output` from `input`."""
        self.steps.run(forced_isa.get())

    def set_conditions(self, *conditions: Tensor) -> None:
        """Sets the network's conditions, (batch,) each, and computes what depends on them only."""
        if self._by_level:
            levels = conditions[0].to("cpu", torch.int64).contiguous()
            self.steps.set_levels(array("levels", levels, (self.batch,), torch.int64), self.batch)
        if self._vectors:
            names = self.graph.condition_parameters
            parameters = [self.constant(name) for name in names]
            rows = self.graph.condition(self.batch, *conditions, *parameters)
            for vector, row in zip(self.graph.vectors, rows, strict=True):
                for less in (0, 1):
                    if (vector, less) in self._vectors:
                        self._vectors[vector, less].copy_(row - less)

    def profile(self) -> list[float]:
        """Runs the plan; returns the seconds of each operation."""
        seconds = iter(self.steps.profile(forced_isa.get()))
        return [sum(next(seconds) for _ in range(count)) for count in self._spans]

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and parameters, shared between plans."""
        return sum(t.numel() * t.element_size() for ts in self.weights.values() for t in ts)

    @property
    def map_bytes(self) -> int:
        """Bytes of the feature-map buffer and the auxiliary buffers."""
        return sum(
            t.nbytes for t in (self._buffer, self._input, *self._rows, *self._vectors.values())
        )

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

    def vector(self, vector: Vector, *, less: int = 0) -> Tensor:
        """Returns the memory (batch, C) of numbers that `set_conditions` computes, minus `less`."""
        rows = torch.zeros(self.batch, vector.channels)
        return self._vectors.setdefault((vector, less), rows)

    def own(self, tensor: Tensor) -> Tensor:
        """Keeps a tensor as long as the plan."""
        self._rows.append(tensor)
        return tensor

    def level_rows(self, table: Tensor, channels: int) -> list[Tensor]:
        """Returns memory for alpha, gamma and beta (batch, C) of each image's level."""
        rows = [self.own(torch.zeros(self.batch, channels)) for _ in range(3)]
        self._by_level = True
        shape = (self.batch, channels)
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

    def _add(self, op: Op) -> OpCost:
        kind, before = op.kind, len(self.steps)
        self._in_torch = False
        if isinstance(op.spec, ConvolutionSpec):
            kind = self._add_convolution(op, op.spec)
        else:
            steps.add(self, op)
        if self._in_torch and kind != "torch":
            kind = f"{kind} (torch)"
        self._spans.append(len(self.steps) - before)
        y = op.outputs[0]
        moved = sum(self._bytes(x) for x in (*op.inputs, *op.outputs))
        return OpCost(kind, op.name, self._shape(y), self.batch * op.flop, moved)

    def _add_convolution(self, op: Op, spec: ConvolutionSpec) -> str:
        """Adds a convolution step and returns its kind."""
        if f"{op.name} (winograd)" in self.weights or self._chooses_winograd(op, spec):
            self._add_winograd(op, spec)
            return "winograd"
        x, y = op.inputs[0], op.outputs[0]
        if op.name not in self.weights:
            self.weights[op.name] = onednn.pack(spec, self._shape(x), self.dtype)
        onednn.add(
            self.steps, op.name, spec, self.tensor(x), self.weights[op.name], self.tensor(y),
            clear=not op.overwrites,
        )  # fmt: skip
        return "conv"

    def _chooses_winograd(self, op: Op, spec: ConvolutionSpec) -> bool:
        """Returns whether to use Winograd; packed weights keep their algorithm at every size."""
        if op.name in self.weights:
            return False
        if isinstance(self.winograd, bool):
            return self.winograd and can_be_winograd(op, spec)
        return op.name in self.winograd

    def _add_winograd(self, op: Op, spec: ConvolutionSpec) -> None:
        x, y = op.inputs[0], op.outputs[0]
        key = f"{op.name} (winograd)"
        if key not in self.weights:
            packed = winograd_pack(spec.kernel().to("cpu", torch.float32), self.dtype)
            bias = (
                None
                if spec.bias is None
                else spec.bias.detach().to("cpu", torch.float32, copy=True)
            )
            self.weights[key] = [t for t in (packed.values, packed.scales, bias) if t is not None]
        values, *rest = self.weights[key]
        scales = rest.pop(0) if self.bfloat16 else None
        weights = WinogradWeights(values, scales, x.channels, y.channels)
        offsets = array("bias", rest[0], (y.channels,), torch.float32) if rest else NONE
        self.steps.winograd_conv(
            self.array(x), *weights.arrays(), offsets, self.array(y), self.nhwc(x), y.channels,
            spec.dilation, bool(op.overwrites), self.bfloat16,
        )  # fmt: skip


def can_be_winograd(op: Op, spec: ConvolutionSpec) -> bool:
    """Whether Winograd's algorithm covers a convolution, and its tiles fit the map."""
    x, plain = op.inputs[0], spec.stride == spec.groups == 1
    fits = plain and spec.taps == 3 and spec.padding == spec.dilation
    return fits and winograd_pays(x.channels, spec.channels, x.height, x.width, spec.dilation)

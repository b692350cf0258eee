"""Plan of a network for the CPU: packed weights, one buffer for all feature maps, C++ steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncsn_fast.engines.cpu import onednn
from ncsn_fast.engines.lowering.graph import ConvolutionSpec, Graph, Map, NormSpec, Op
from ncsn_fast.engines.lowering.memory_plan import OpCost, aligned, plan_memory
from ncsn_fast.ops.addresses import NONE, Array, array, part
from ncsn_fast.ops.cpu import WinogradWeights, winograd_pack, winograd_pays
from ncsn_fast.ops.extension import _C, forced_isa

# Weights by operation name: a convolution's weight in oneDNN's packed layout (the same for every
# batch size) and bias, or a norm's parameters.
Weights = dict[str, list[Tensor]]


class CpuPlan:
    """A graph ready to run on `batch` images in one dtype.

    Args:
        weights: weights of another plan of the same network and dtype, to share; missing ones are
            copied from the network and packed.
        winograd: run 3x3 convolutions by Winograd's algorithm where it pays.

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
        winograd: bool = False,
    ) -> None:
        self.graph, self.batch, self.dtype, self.winograd = graph, batch, dtype, winograd
        self.weights: Weights = {} if weights is None else weights
        self._bfloat16 = dtype is torch.bfloat16
        self._offsets, size = plan_memory(graph, batch, dtype.itemsize)
        self._buffer = aligned(size)
        self.input, self.output = self._tensor(graph.input), self._tensor(graph.output)
        self._input = torch.empty(self.input.shape, dtype=torch.float32)  # before rounding
        self._rows: list[Tensor] = []  # parameters of each image's level
        self.steps = _C.Plan(*onednn.addresses())
        self.costs = [self._add(op) for op in graph.ops]

    def load(self, x: Tensor, scale: float, shift: float) -> None:
        """Sets input = scale * x + shift, computed in float32 as in the sampler update."""
        self.input.copy_(torch.mul(x, scale, out=self._input).add_(shift))

    def run(self) -> None:
        """Computes `output` from `input`."""
        self.steps.run(forced_isa.get())

    def set_levels(self, levels: Tensor) -> None:
        """Sets the norms' parameters for the level of each image, (batch,) int64."""
        levels = levels.to("cpu", torch.int64).contiguous()
        self.steps.set_levels(array("levels", levels, (self.batch,), torch.int64), self.batch)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and parameters, shared between plans."""
        return sum(t.numel() * t.element_size() for ts in self.weights.values() for t in ts)

    @property
    def map_bytes(self) -> int:
        """Bytes of the feature-map buffer and the auxiliary buffers."""
        return sum(t.nbytes for t in (self._buffer, self._input, *self._rows))

    def _tensor(self, x: Map) -> Tensor:
        """Returns a map as a (batch, C, H, W) channels-last view of the buffer."""
        n, c, h, w = self._shape(x)
        flat = self._buffer[self._offsets[x] :].view(self.dtype)
        return flat.as_strided((n, c, h, w), (h * w * c, 1, w * c, c))

    def _shape(self, x: Map) -> tuple[int, int, int, int]:
        return self.batch, x.channels, x.height, x.width

    def _nhwc(self, x: Map) -> tuple[int, int, int, int]:
        return self.batch, x.height, x.width, x.channels

    def _array(self, x: Map) -> Array:
        return part(self._buffer, self._offsets[x], self._bytes(x))

    def _bytes(self, x: Map) -> int:
        return math.prod(self._shape(x)) * self.dtype.itemsize

    def _add(self, op: Op) -> OpCost:
        kind: str = op.kind
        if isinstance(op.spec, ConvolutionSpec):
            kind = self._add_convolution(op, op.spec)
        elif isinstance(op.spec, NormSpec):
            self._add_norm(op, op.spec)
        elif op.kind == "resize_add":
            self._add_resize(op)
        else:
            self._add_elementwise(op)
        y = op.outputs[0]
        flop = self.batch * op.spec.flop(y) if isinstance(op.spec, ConvolutionSpec) else 0.0
        moved = sum(self._bytes(x) for x in (*op.inputs, *op.outputs))
        return OpCost(kind, op.name, self._shape(y), flop, moved)

    def _add_convolution(self, op: Op, spec: ConvolutionSpec) -> str:
        """Adds a convolution step and returns its kind."""
        if f"{op.name} (winograd)" in self.weights or self._chooses_winograd(op, spec):
            self._add_winograd(op, spec)
            return "winograd"
        x, y = op.inputs[0], op.outputs[0]
        if op.name not in self.weights:
            self.weights[op.name] = onednn.pack(spec, self._shape(x), self.dtype)
        onednn.add(
            self.steps, op.name, spec, self._tensor(x), self.weights[op.name], self._tensor(y),
            clear=not op.overwrites,
        )  # fmt: skip
        return "conv"

    def _chooses_winograd(self, op: Op, spec: ConvolutionSpec) -> bool:
        """Returns whether to use Winograd; packed weights keep their algorithm at every size."""
        if not self.winograd or op.name in self.weights:
            return False
        x, fits = op.inputs[0], spec.taps == 3 and spec.padding == spec.dilation
        return fits and winograd_pays(x.channels, spec.channels, x.height, x.width, spec.dilation)

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
        scales = rest.pop(0) if self._bfloat16 else None
        weights = WinogradWeights(values, scales, x.channels, y.channels)
        offsets = array("bias", rest[0], (y.channels,), torch.float32) if rest else NONE
        self.steps.winograd_conv(
            self._array(x), *weights.arrays(), offsets, self._array(y), self._nhwc(x), y.channels,
            spec.dilation, bool(op.overwrites), self._bfloat16,
        )  # fmt: skip

    def _add_norm(self, op: Op, spec: NormSpec) -> None:
        x, y = op.inputs[0], op.outputs[0]
        if op.name not in self.weights:
            self.weights[op.name] = [
                p.detach().to("cpu", torch.float32, copy=True).contiguous() for p in spec.parameters
            ]
        rows = self.weights[op.name]
        if spec.by_level:
            (table,) = rows
            rows = [torch.zeros(self.batch, x.channels, dtype=torch.float32) for _ in range(3)]
            self._rows += rows
            parameters = [self._parameter(row, self.batch, x.channels) for row in rows]
            self.steps.level_parameters(
                self._parameter(table, len(table), 3 * x.channels), len(table), self.batch,
                x.channels, *parameters,
            )  # fmt: skip
        else:
            parameters = [self._parameter(row, x.channels) for row in rows]
        self.steps.instance_norm_plus(
            self._array(x), self._array(y), *parameters, self.batch, x.channels,
            x.height * x.width, True, spec.by_level, self._bfloat16, self._bfloat16, spec.elu, 1e-5,
        )  # fmt: skip

    def _parameter(self, parameter: Tensor, *shape: int) -> Array:
        return array("parameters of a norm", parameter, shape, torch.float32)

    def _add_resize(self, op: Op) -> None:
        x, y = op.inputs[0], op.outputs[0]
        self.steps.resize_add(
            self._array(x), self._array(y), self._array(y), self._nhwc(x), y.height, y.width,
            self._bfloat16,
        )  # fmt: skip

    def _add_elementwise(self, op: Op) -> None:
        x, y = self._array(op.inputs[0]), self._array(op.outputs[0])
        count = math.prod(self._shape(op.inputs[0]))
        if op.kind == "elu":
            self.steps.add_elu(x, NONE, NONE, y, count, self._bfloat16)
        elif op.kind in ("add", "add_elu"):
            b = self._array(op.inputs[1])
            elu = self._array(op.outputs[1]) if op.kind == "add_elu" else NONE
            self.steps.add_elu(x, b, y, elu, count, self._bfloat16)
        elif op.kind == "mean_pool2":
            self.steps.mean_pool2(x, NONE, y, self._nhwc(op.inputs[0]), self._bfloat16)
        else:
            pool = {"max_pool5": self.steps.max_pool5, "avg_pool5": self.steps.avg_pool5}[op.kind]
            pool(x, y, self._nhwc(op.inputs[0]), self._bfloat16)

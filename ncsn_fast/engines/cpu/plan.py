"""Plan of a network for the CPU: packed weights, one buffer for all feature maps, C++ steps."""

from __future__ import annotations

import math

from collections.abc import Sequence

import torch
from torch import Tensor

from ncsn_fast.engines.cpu import onednn, torch_steps
from ncsn_fast.engines.lowering.graph import (
    ACTIVATIONS,
    ActivationSpec,
    AffineSpec,
    AttentionSpec,
    ConvolutionSpec,
    CopySpec,
    Factor,
    Graph,
    GroupNormSpec,
    Map,
    NormSpec,
    Op,
    PadSpec,
    TorchSpec,
    TransposedSpec,
    Vector,
    View,
)
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
        self._by_level = False
        self._vectors = {v: torch.zeros(batch, v.channels) for v in graph.vectors}
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
            parameters = [self._constant(name) for name in names]
            rows = self.graph.condition(self.batch, *conditions, *parameters)
            for vector, row in zip(self.graph.vectors, rows, strict=True):
                self._vectors[vector].copy_(row)

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
        return sum(t.nbytes for t in (self._buffer, self._input, *self._rows, *self._vectors.values()))

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

    def _view(self, view: View) -> Tensor:
        """Returns a view of a map as a (batch, ...) tensor in the buffer."""
        flat = self._buffer[self._offsets[view.map] :]
        flat = flat[: self._bytes(view.map)].view(self.dtype)
        strides = (view.map.numel, *view.strides)
        return flat.as_strided((self.batch, *view.shape), strides, flat.storage_offset() + view.offset)

    def _constant(self, name: str) -> Tensor:
        """Returns a tensor that programs read; floating-point ones in float32."""
        key = f"{name} (constant)"
        if key not in self.weights:
            tensor = self.graph.parameters[name].detach()
            kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
            self.weights[key] = [tensor.to("cpu", kind, copy=True)]
        return self.weights[key][0]

    def _add(self, op: Op) -> OpCost:
        kind, before = op.kind, len(self.steps)
        if isinstance(op.spec, ConvolutionSpec):
            kind = self._add_convolution(op, op.spec)
        elif isinstance(op.spec, NormSpec):
            self._add_norm(op, op.spec)
        elif op.kind in ("resize", "resize_add"):
            self._add_resize(op)
        elif op.kind in ("elu", "add", "add_elu", "mean_pool2", "max_pool5", "avg_pool5"):
            self._add_elementwise(op)
        else:
            self.steps.callback(self._torch_step(op))
        self._spans.append(len(self.steps) - before)
        y = op.outputs[0]
        moved = sum(self._bytes(x) for x in (*op.inputs, *op.outputs))
        return OpCost(kind, op.name, self._shape(y), self.batch * op.flop, moved)

    def _torch_step(self, op: Op) -> torch_steps.Step:
        """Returns an operation as a function that PyTorch runs."""
        spec, xs = op.spec, [self._tensor(x) for x in op.inputs]
        y = self._tensor(op.outputs[-1])
        if isinstance(spec, GroupNormSpec):
            return torch_steps.group_norm(xs[0], spec, self._group_norm_parameters(op, spec), y)
        if isinstance(spec, AffineSpec):
            scale, shift = (self._factor(f"{op.name} {n}", f) for n, f in enumerate((spec.scale, spec.shift)))
            return torch_steps.affine(xs[0], scale, shift, y)
        if isinstance(spec, TransposedSpec):
            weight, *bias = self._plain_weights(op.name, spec.weight, spec.bias)
            return torch_steps.conv_transpose(xs[0], spec, weight, bias[0] if bias else None, y)
        if isinstance(spec, PadSpec):
            return torch_steps.pad(xs[0], spec, y)
        if isinstance(spec, CopySpec):
            return torch_steps.copy(self._view(spec.source), self._view(spec.target))
        if isinstance(spec, AttentionSpec):
            q, k, v = map(self._view, (spec.query, spec.key, spec.value))
            n, heads, length, width = (*q.shape[:3], v.shape[3])
            across = heads * width
            flat = y.as_strided((n, heads, length, width), (length * across, width, across, 1))
            return torch_steps.attention(q, k, v, spec.scale, flat)
        if isinstance(spec, TorchSpec):
            vectors = [
                self._vectors[v].view(self.batch, *shape)
                for v, shape in zip(spec.vectors, spec.shapes, strict=True)
            ]
            constants = [*vectors, *map(self._constant, spec.parameters)]
            inputs, outputs = ([*map(self._view, views)] for views in (spec.inputs, spec.outputs))
            return torch_steps.program(spec.program, self.batch, inputs, constants, outputs)
        if op.kind in ACTIVATIONS:
            slope = spec.slope if isinstance(spec, ActivationSpec) else 0.0
            return torch_steps.activation(op.kind, slope, xs[0], y)
        if op.kind.startswith("add_"):
            total = self._tensor(op.outputs[0]) if len(op.outputs) > 1 else None
            return torch_steps.add(xs, total, op.kind.removeprefix("add_"), y)
        return {"concat": torch_steps.concat, "nearest2": lambda x, y: torch_steps.nearest2(x[0], y)}[
            op.kind
        ](xs, y)

    def _factor(self, key: str, factor: Factor) -> Tensor:
        """Returns a factor as a float32 tensor that broadcasts to (batch, C, H, W)."""
        if isinstance(factor, Vector):
            return self._vectors[factor][:, :, None, None]
        if key not in self.weights:
            tensor = torch.as_tensor(factor, dtype=torch.float32).detach()
            self.weights[key] = [tensor.to("cpu", copy=True).view(-1, 1, 1)]
        return self.weights[key][0]

    def _group_norm_parameters(self, op: Op, spec: GroupNormSpec) -> list[Tensor | None]:
        """Returns weight and bias (C,), then what is added, scale and shift (batch, C)."""
        found: list[Tensor | None] = []
        for name, parameter in (("weight", spec.weight), ("bias", spec.bias)):
            key = f"{op.name} {name}"
            if parameter is not None and key not in self.weights:
                self.weights[key] = [parameter.detach().to("cpu", torch.float32, copy=True)]
            found.append(None if parameter is None else self.weights[key][0])
        vectors = (spec.add, spec.scale, spec.shift)
        return found + [None if v is None else self._vectors[v] for v in vectors]

    def _plain_weights(self, key: str, *tensors: Tensor | None) -> Sequence[Tensor]:
        """Returns copies of weights in the maps' type, channels-last."""
        if key not in self.weights:
            self.weights[key] = [
                t.detach().to("cpu", self.dtype, copy=True).contiguous(
                    memory_format=torch.channels_last if t.ndim == 4 else torch.contiguous_format
                )
                for t in tensors
                if t is not None
            ]
        return self.weights[key]

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
        x, plain = op.inputs[0], spec.stride == spec.groups == 1
        fits = plain and spec.taps == 3 and spec.padding == spec.dilation
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
        if spec.vectors:
            self._add_instance_norm_plus(x, y, [self._vectors[v] for v in spec.vectors], spec)
            return
        if op.name not in self.weights:
            self.weights[op.name] = [
                p.detach().to("cpu", torch.float32, copy=True).contiguous() for p in spec.parameters
            ]
        rows = self.weights[op.name]
        if spec.by_level:
            (table,) = rows
            rows = [torch.zeros(self.batch, x.channels, dtype=torch.float32) for _ in range(3)]
            self._rows += rows
            self._by_level = True
            self.steps.level_parameters(
                self._parameter(table, len(table), 3 * x.channels), len(table), self.batch,
                x.channels, *(self._parameter(row, self.batch, x.channels) for row in rows),
            )  # fmt: skip
        self._add_instance_norm_plus(x, y, rows, spec)

    def _add_instance_norm_plus(self, x: Map, y: Map, rows: list[Tensor], spec: NormSpec) -> None:
        """Adds the norm with parameters (C,), or (batch, C) for each image."""
        each = rows[0].ndim == 2
        shape = (self.batch, x.channels) if each else (x.channels,)
        self.steps.instance_norm_plus(
            self._array(x), self._array(y), *(self._parameter(row, *shape) for row in rows),
            self.batch, x.channels, x.height * x.width, True, each, self._bfloat16, self._bfloat16,
            spec.elu, spec.eps,
        )  # fmt: skip

    def _parameter(self, parameter: Tensor, *shape: int) -> Array:
        return array("parameters of a norm", parameter, shape, torch.float32)

    def _add_resize(self, op: Op) -> None:
        x, y = op.inputs[0], op.outputs[0]
        added = self._array(y) if op.kind == "resize_add" else NONE
        self.steps.resize_add(
            self._array(x), added, self._array(y), self._nhwc(x), y.height, y.width,
            self._bfloat16,
        )  # fmt: skip

    def _add_elementwise(self, op: Op) -> None:
        x, y = self._array(op.inputs[0]), self._array(op.outputs[0])
        count = math.prod(self._shape(op.inputs[0]))
        if op.kind == "elu":
            self.steps.add_elu(x, NONE, NONE, y, count, self._bfloat16)
        elif op.kind in ("add", "add_elu"):
            b = self._array(op.inputs[1])
            elu = self._array(op.outputs[-1]) if op.kind == "add_elu" else NONE
            total = y if op.kind == "add" or len(op.outputs) > 1 else NONE
            self.steps.add_elu(x, b, total, elu, count, self._bfloat16)
        elif op.kind == "mean_pool2":
            self.steps.mean_pool2(x, NONE, y, self._nhwc(op.inputs[0]), self._bfloat16)
        else:
            pool = {"max_pool5": self.steps.max_pool5, "avg_pool5": self.steps.avg_pool5}[op.kind]
            pool(x, y, self._nhwc(op.inputs[0]), self._bfloat16)

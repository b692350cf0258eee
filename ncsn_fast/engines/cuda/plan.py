"""Plan of a fused graph for the GPU: each operation is a kernel launch with bound buffers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ncsn_fast.engines.cuda.kernels import Kernels
from ncsn_fast.engines.lowering.graph import (
    ConvolutionSpec,
    Graph,
    Map,
    NormSpec,
    Op,
    PointwiseSpec,
)
from ncsn_fast.engines.lowering.memory_plan import OpCost, aligned, plan_memory

# Weights by operation index: a convolution's weight, a norm's parameters, or the sum of the biases
# that the operation adds. Key -1: the parameters of all norms at all levels.
Weights = dict[int, list[Tensor]]
_LEVELS = -1


class CudaPlan:
    """A fused graph ready to run on `batch` images in one dtype.

    `run` only launches kernels: it allocates nothing of ours, reads nothing back and always does
    the same, so a CUDA graph can capture it.

    Args:
        weights: weights of another plan of the same network and dtype, to share; missing ones are
            copied from the network.

    Attributes:
        input: (batch, C', H, W), C' a multiple of 8; channels beyond the image's are zero.
        output: f, (batch, C, H, W), channels-last, in memory padded the same way.
        level: (batch,) int64, the level of each image, for networks conditioned on it.
        costs: kind, shape, FLOP and bytes of each operation.
    """

    def __init__(
        self,
        graph: Graph,
        channels: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels,
        weights: Weights | None = None,
    ) -> None:
        self.graph, self.batch, self.dtype, self.device = graph, batch, dtype, device
        self.kernels = kernels
        self.weights: Weights = {} if weights is None else weights
        self._offsets, size = plan_memory(graph, batch, dtype.itemsize)
        self._buffer = aligned(size, device)
        self.input, output = self._tensor(graph.input), self._tensor(graph.output)
        self.output = output[:, :channels]
        self.level = torch.zeros(batch, dtype=torch.int64, device=device)
        self._parameters = self._level_parameters()
        self._partials = self._workspace()
        built = [self._build(i, op) for i, op in enumerate(graph.ops)]
        self.costs, self.steps = map(list, zip(*built, strict=True))

    def load(self, x: Tensor, scale: float, shift: float) -> None:
        """Sets input = scale * x + shift, computed in float32 as in the sampler update."""
        self.input[:, : x.shape[1]].copy_(x * scale + shift)

    def run(self) -> None:
        """Computes `output` from `input` (and `level`)."""
        if self._parameters is not None:
            torch.index_select(self.weights[_LEVELS][0], 0, self.level, out=self._parameters)
        for step in self.steps:
            step()

    @property
    def conditional(self) -> bool:
        return self._parameters is not None

    @property
    def launches(self) -> int:
        return len(self.steps)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and parameters, shared between plans."""
        return sum(t.nbytes for ts in self.weights.values() for t in ts)

    @property
    def map_bytes(self) -> int:
        """Bytes of the feature-map buffer and the auxiliary buffers."""
        beside = (self._buffer, self.level, self._partials, self._parameters)
        return sum(t.nbytes for t in beside if t is not None)

    def _tensor(self, x: Map) -> Tensor:
        """Returns a map as a (batch, C, H, W) channels-last view of the buffer."""
        n, c, h, w = self._shape(x)
        flat = self._buffer[self._offsets[x] :]
        flat = flat[: flat.numel() // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)
        return flat.as_strided((n, c, h, w), (h * w * c, 1, w * c, c))

    def _shape(self, x: Map) -> tuple[int, int, int, int]:
        return self.batch, x.channels, x.height, x.width

    def _norms(self) -> list[tuple[int, Op, NormSpec]]:
        ops = enumerate(self.graph.ops)
        return [(i, op, op.spec) for i, op in ops if isinstance(op.spec, NormSpec)]

    def _level_parameters(self) -> Tensor | None:
        """Allocates the parameters of all norms for each image's level, if they depend on it."""
        tables = [spec.parameters[0].detach() for _, _, spec in self._norms() if spec.by_level]
        if not tables:
            return None
        if _LEVELS not in self.weights:
            self.weights[_LEVELS] = [torch.cat(tables, dim=1).to(self.device, torch.float32)]
        table = self.weights[_LEVELS][0]
        return torch.empty(self.batch, table.shape[1], device=self.device)

    def _workspace(self) -> Tensor:
        """Allocates the buffer of statistics that all norms use in turn."""
        sizes = [
            self.kernels.new_partials(self._tensor(op.inputs[0])).numel()
            for _, op, _ in self._norms()
        ]
        return torch.empty(max(sizes, default=0), device=self.device)

    def _build(self, index: int, op: Op) -> tuple[OpCost, Callable[[], object]]:
        inputs, outputs = map(list, (map(self._tensor, ms) for ms in (op.inputs, op.outputs)))
        flop, kernels = 0.0, self.kernels
        step: Callable[[], object]
        if isinstance(op.spec, ConvolutionSpec):
            (x,), (y,) = inputs, outputs
            weight = self._convolution_weight(index, op, op.spec)
            flop = self.batch * op.spec.flop(op.outputs[0])
            step = functools.partial(kernels.convolution, x, weight, op.spec, y)
        elif isinstance(op.spec, NormSpec):
            step = self._norm(index, op.spec, inputs[0], outputs[0])
        elif isinstance(op.spec, PointwiseSpec):
            bias = self._bias(index, op.spec.bias, op.inputs[0])
            total = outputs[0] if op.spec.total else None
            elu = outputs[-1] if op.spec.elu else None
            step = functools.partial(kernels.pointwise, inputs, bias, total, elu)
        elif op.kind == "resize_add":
            (x, a), (y,) = inputs, outputs
            size = (y.shape[2], y.shape[3])
            step = functools.partial(kernels.resize_add, x, size, a, out=y)
        else:
            step = functools.partial(getattr(kernels, op.kind), inputs[0], out=outputs[0])
        moved = sum(math.prod(self._shape(x)) for x in (*op.inputs, *op.outputs))
        shape = self._shape(op.outputs[0])
        return OpCost(op.kind, op.name, shape, flop, moved * self.dtype.itemsize), step

    def _convolution_weight(self, index: int, op: Op, spec: ConvolutionSpec) -> Tensor:
        """Returns the weight, zero-padded to the channels of its maps."""
        if index not in self.weights:
            weight = spec.kernel().to(self.device, torch.float32)
            more = op.outputs[0].channels - weight.shape[0], op.inputs[0].channels - weight.shape[1]
            weight = torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, more[1], 0, more[0]))
            weight = weight.to(self.dtype, memory_format=torch.channels_last)
            self.weights[index] = [weight]
        return self.weights[index][0]

    def _norm(self, index: int, spec: NormSpec, x: Tensor, y: Tensor) -> Callable[[], object]:
        if spec.by_level:
            gamma, alpha, beta = self._columns(index, x.shape[1])
        else:
            if index not in self.weights:
                self.weights[index] = [self._float32(p) for p in spec.parameters]
            alpha, gamma, beta = self.weights[index][:3]
        shape = self.kernels.new_partials(x).shape
        return functools.partial(
            self.kernels.instance_norm_plus, x, alpha, gamma, beta, elu=spec.elu,
            bias=self._bias(index, spec.bias), out=y,
            partials=self._partials[: math.prod(shape)].view(shape),
        )  # fmt: skip

    def _columns(self, index: int, channels: int) -> tuple[Tensor, ...]:
        """Returns gamma, alpha and beta of a norm, (batch, C) each, for the images' levels."""
        assert self._parameters is not None
        first = 3 * sum(op.inputs[0].channels for i, op, _ in self._norms() if i < index)
        return self._parameters[:, first : first + 3 * channels].chunk(3, dim=1)

    def _bias(self, index: int, biases: tuple[Tensor, ...], x: Map | None = None) -> Tensor | None:
        """Returns the sum of biases (C,) in float32, zero-padded to the channels of x."""
        if not biases:
            return None
        key = ~index - 1  # beside the weights of the operation, below _LEVELS
        if key not in self.weights:
            total = sum((self._float32(b) for b in biases[1:]), self._float32(biases[0]))
            more = 0 if x is None else x.channels - len(total)
            self.weights[key] = [torch.nn.functional.pad(total, (0, more))]
        return self.weights[key][0]

    def _float32(self, x: Tensor) -> Tensor:
        return x.detach().to(self.device, torch.float32, copy=True).contiguous()

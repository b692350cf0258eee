"""Plan of a fused graph for the GPU: each operation is a kernel launch with bound buffers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ncsn_fast.engines.cuda import steps
from ncsn_fast.engines.cuda.kernels import Kernels
from ncsn_fast.engines.cuda.loop import Vectors
from ncsn_fast.engines.cuda.memory import PlanMemory
from ncsn_fast.engines.lowering import torch_steps
from ncsn_fast.engines.lowering.graph import Graph, Op, TorchSpec
from ncsn_fast.engines.lowering.memory_plan import OpCost
from ncsn_fast.engines.lowering.static_memory import Weights, network_input
from ncsn_fast.engines.lowering.torch_steps import Step
from ncsn_fast.engines.torch_settings import cudnn_precision


class CudaPlan(PlanMemory):
    """A fused graph ready to run on `batch` images in one dtype.

    `run` only launches kernels: it allocates nothing of ours, reads nothing back and always does
    the same, so a CUDA graph can capture it. What PyTorch runs may allocate, in the graph's pool.

    Args:
        channels: of an image.
        weights: weights of another plan of the same network and dtype, to share; missing ones are
            copied from the network.
        level: dtype of the noise level that the network takes; None if it takes none.
        default_label: of images without one; None for a network without classes.

    Attributes:
        input: (batch, C', H, W), C' >= C; channels beyond the image's are zero.
        output: f, (batch, C, H, W), channels-last, in memory padded the same way.
        level: (batch,), the level of each image, for networks conditioned on it.
        labels: (batch,) int64, the class of each image; None without classes.
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
        *,
        level: torch.dtype | None = torch.int64,
        default_label: int | None = None,
    ) -> None:
        super().__init__(graph, batch, dtype, device, kernels, weights)
        self.input, output = self.tensor(graph.input), self.tensor(graph.output)
        self.output = output[:, :channels]
        self.level = torch.zeros(batch, dtype=level or torch.int64, device=device)
        self.default_label, self.labels = default_label, None
        if default_label is not None:
            self.labels = torch.full((batch,), default_label, device=device)
        self._conditions = [self.level] if level is not None else []
        self._conditions += [] if self.labels is None else [self.labels]
        self.conditional = level is not None and bool(self._columns or graph.vectors)
        self.costs: list[OpCost] = []
        self.steps: list[Step] = []
        for op in graph.ops:
            self._add(op)
        alone = level is not None and bool(graph.vectors) and not self._columns
        alone = alone and default_label is None
        self.vectors = self._level_vectors() if alone else None

    def load(self, x: Tensor, scale: float, shift: float) -> None:
        """Sets input = scale * x + shift, as a sampler update does."""
        self.input[:, : x.shape[1]].copy_(network_input(x, scale, shift))

    def run(self) -> None:
        """Computes `output` from `input` (and `level` and `labels`)."""
        self.set_levels(self.level)
        self.set_vectors(*self._conditions)
        self._run_steps()

    def _run_steps(self) -> None:
        for step in self.steps:
            step()

    def _level_vectors(self) -> Vectors:
        compute = functools.partial(self.set_vectors, *self._conditions)
        return Vectors(*self.shared_rows(), compute=compute, run=self._run_steps)

    @property
    def launches(self) -> int:
        """Kernels that a step launches; of PyTorch's programs, one for each node."""
        programs = [op.spec.program for op in self.graph.ops if isinstance(op.spec, TorchSpec)]
        if self.graph.condition is not None and self.vectors is None:
            programs.append(self.graph.condition)
        return len(self.steps) + sum(len(program.graph.nodes) for program in programs)

    def _add(self, op: Op) -> None:
        kind, step = op.kind, steps.kernel_step(self, op)
        if step is None:
            kind = kind if kind == "torch" else f"{kind} (torch)"
            step = functools.partial(self._in_torch, torch_steps.step(self, op))
        moved = sum(self.bytes(x) for x in (*op.inputs, *op.outputs))
        flop = self.batch * op.flop
        self.steps.append(step)
        self.costs.append(OpCost(kind, op.name, self.shape(op.outputs[0]), flop, moved))

    def _in_torch(self, step: Step) -> None:
        """Runs an operation of PyTorch, with the precision that our convolutions have."""
        with cudnn_precision(self.kernels.precision, self.device):
            step()

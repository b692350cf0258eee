"""Memory of a plan for the GPU: maps, weights, workspace, and parameters of each image."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ncsn_fast.engines.cuda.kernels import Kernels
from ncsn_fast.engines.lowering.graph import AffineSpec, ConvolutionSpec, Graph, NormSpec, Op
from ncsn_fast.engines.lowering.lower import vectors_of
from ncsn_fast.engines.lowering.static_memory import StaticMemory, Weights

_LEVELS = "(levels)"  # the parameters of all norms at all levels


def _row_size(op: Op) -> int:
    """Returns the most numbers of an image that an operation reads beside its maps."""
    if isinstance(op.spec, AffineSpec):
        return 3 * op.inputs[0].channels
    return sum(vector.channels for vector in vectors_of(op.spec))


class PlanMemory(StaticMemory):
    """Memory of a fused graph's maps on a device, and what its kernels read beside them."""

    def __init__(
        self,
        graph: Graph,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels,
        weights: Weights | None = None,
    ) -> None:
        super().__init__(graph, batch, dtype, weights, device)
        self.kernels = kernels
        self._row_sizes: list[int] = []  # numbers of an image, in the order of their memory
        self._rows = self.own(self._empty(batch * sum(map(_row_size, graph.ops))).zero_())
        self._partials, self._coefficients = self._workspaces()
        self._columns, self._parameters = self._level_parameters()

    def new_rows(self, *shape: int) -> Tensor:
        used, size = self.batch * sum(self._row_sizes), math.prod(shape)
        self._row_sizes.append(size)
        return self._rows[used : used + self.batch * size].view(self.batch, *shape)

    def shared_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the memory of all rows, for images that have the same numbers.

        Also returns which of its places are the first image's, and the number of these that each
        place has.
        """
        columns, first, done = [], [], 0
        for size in self._row_sizes:
            own = torch.arange(done, done + size)
            first.append(self.batch * done + torch.arange(size))
            columns.append(own.repeat(self.batch))
            done += size
        places, numbers = (self.own(torch.cat(p).to(self.device)) for p in (first, columns))
        return self._rows[: self.batch * done], places, numbers

    def set_levels(self, level: Tensor) -> None:
        """Reads the parameters of norms for the images' levels (batch,) int64."""
        if self._parameters is not None:
            torch.index_select(self.weights[_LEVELS][0], 0, level, out=self._parameters)

    def workspace(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns partials and coefficients of a norm of x; all norms use them in turn."""
        n, c = x.shape[:2]
        partials = self.kernels.new_partials(x).shape
        coefficients = (n, 3, c)
        return (
            self._partials[: math.prod(partials)].view(partials),
            self._coefficients[: math.prod(coefficients)].view(coefficients),
        )

    def level_rows(self, op: Op) -> tuple[Tensor, ...]:
        """Returns gamma, alpha and beta of a norm, (batch, C) each, for the images' levels."""
        assert self._parameters is not None
        first = self._columns[op.name]
        return self._parameters[:, first : first + 3 * op.inputs[0].channels].chunk(3, dim=1)

    def convolution_weight(self, op: Op, spec: ConvolutionSpec) -> Tensor:
        """Returns the weight, zero-padded to the channels of its maps."""
        if op.name not in self.weights:
            weight = spec.kernel().to(self.device, torch.float32)
            more = op.outputs[0].channels - weight.shape[0], op.inputs[0].channels - weight.shape[1]
            weight = pad(weight, (0, 0, 0, 0, 0, more[1], 0, more[0]))
            weight = weight.to(self.dtype, memory_format=torch.channels_last)
            self.weights[op.name] = [weight]
        return self.weights[op.name][0]

    def bias(self, op: Op, biases: tuple[Tensor, ...]) -> Tensor | None:
        """Returns the sum of biases (C,) in float32, zero-padded to the channels of the input."""
        if not biases:
            return None
        key = f"{op.name} (bias)"
        if key not in self.weights:
            first, *rest = (b.detach().to(self.device, torch.float32, copy=True) for b in biases)
            total = sum(rest, first)
            self.weights[key] = [pad(total, (0, op.inputs[0].channels - len(total)))]
        return self.weights[key][0]

    def _workspaces(self) -> tuple[Tensor, Tensor]:
        """Allocates the buffers of statistics that all norms use in turn."""
        partials = coefficients = 0
        for op in self.graph.ops:
            if op.kind in ("norm", "group_norm"):
                x = self.tensor(op.inputs[0])
                partials = max(partials, self.kernels.new_partials(x).numel())
                coefficients = max(coefficients, 3 * x.shape[0] * x.shape[1])
        return self.own(self._empty(partials)), self.own(self._empty(coefficients))

    def _level_parameters(self) -> tuple[dict[str, int], Tensor | None]:
        """Allocates the parameters of all norms for each image's level, if they depend on it.

        Returns the first column of each norm, too.
        """
        norms = {
            op.name: op.spec.parameters[0].detach()
            for op in self.graph.ops
            if isinstance(op.spec, NormSpec) and op.spec.by_level
        }
        if not norms:
            return {}, None
        columns, width = {}, 0
        for name, table in norms.items():
            columns[name] = width
            width += table.shape[1]
        if _LEVELS not in self.weights:
            table = torch.cat([*norms.values()], dim=1).to(self.device, torch.float32)
            self.weights[_LEVELS] = [table]
        return columns, self.own(self._empty(self.batch, width))

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

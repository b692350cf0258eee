"""Operations of a plan that PyTorch runs: what no kernel of ours covers.

Each function takes tensors in the plan's memory and returns a function that computes the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from ncsn_fast.engines.lowering.graph import PadSpec, TransposedSpec

Step = Callable[[], object]


def leaky_relu(slope: float, x: Tensor, y: Tensor) -> Step:
    """y = x where x > 0, else slope x."""
    return lambda: y.copy_(F.leaky_relu(x, slope))


def pad(x: Tensor, spec: PadSpec, y: Tensor) -> Step:
    """x with rows and columns of zeros around it."""
    height, width = x.shape[2:]
    inner = y[:, :, spec.top : spec.top + height, spec.left : spec.left + width]

    def run() -> None:
        y.zero_()
        inner.copy_(x)

    return run


def copy(x: Tensor, y: Tensor) -> Step:
    """y = x."""
    return lambda: y.copy_(x)


def conv_transpose(
    x: Tensor, spec: TransposedSpec, weight: Tensor, bias: Tensor | None, y: Tensor
) -> Step:
    """Transposed convolution, in the maps' type."""
    return lambda: y.copy_(
        F.conv_transpose2d(
            x, weight, bias, spec.stride, spec.padding, spec.output_padding, spec.groups,
            spec.dilation,
        )
    )  # fmt: skip


def program(
    module: Callable[..., Sequence[Tensor]],
    batch: int,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> Step:
    """outputs = module(batch, *inputs, *constants), in float32 whatever the maps' type."""

    def run() -> None:
        computed = module(batch, *(x.float() for x in inputs), *constants)
        for y, value in zip(outputs, computed, strict=True):
            y.copy_(value)

    return run

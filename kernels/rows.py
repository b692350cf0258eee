"""Rows of a sampler program in device memory, and the counter of the next row.

Layout shared by the Triton and the C++ sampler updates; does not need Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROW_WIDTH = 8  # floats: a, b, g, c, p, q, c_ref and one of padding


class Rows(NamedTuple):
    """Sampler program in device memory, as a captured graph reads it, and its next row.

    table: (K, 8) float32, a row is a, b, g, c, p, q, c_ref (NaN: known pixels are not imposed), 0.
    steps: (K, 2) int64 below 2^32, the step indices of the noise and of the known pixels' noise.
    counter: (1,) int32; from K on an update does nothing.
    """

    table: Tensor
    steps: Tensor
    counter: Tensor


def new_rows(
    coefficients: Tensor, c_ref: Tensor, steps: Tensor, device: torch.device | str
) -> Rows:
    """Builds Rows from (K, 6) coefficients, (K,) scales of the known noise, and (K, 2) steps."""
    k = len(coefficients)
    for name, x, shape in (("c_ref", c_ref, (k,)), ("steps", steps, (k, 2))):
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(x.shape)}")
    if k and not 0 <= int(steps.min()) <= int(steps.max()) < 2**32:
        raise ValueError(
            f"steps must be in [0, 2**32); got {int(steps.min())} .. {int(steps.max())}"
        )
    table = torch.zeros((k, ROW_WIDTH), dtype=torch.float32)
    table[:, :6], table[:, 6] = coefficients, c_ref
    counter = torch.zeros(1, dtype=torch.int32, device=device)
    return Rows(table.to(device), steps.to(device, torch.int64).contiguous(), counter)

"""Rows of a sampler program in device memory, and the counter of the next row.

Layout shared by the Triton and the C++ sampler updates; does not need Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NUMBERS = 11  # of a row: a, b, g, c, p, q, e, r, c_ref, scale, shift
ROW_WIDTH = 12  # floats of a row in memory: its numbers, and one of padding


class Rows(NamedTuple):
    """Sampler program in device memory, as a captured graph reads it, and its next row.

    table: (K, 12) float32, a row is a, b, g, c, p, q, e, r, c_ref (NaN: known pixels are not
        imposed), scale, shift (the next input is scale x' + shift), 0.
    steps: (K, 2) int64 below 2^32, the step indices of the noise and of the known pixels' noise.
    counter: (1,) int32; from K on an update does nothing.
    """

    table: Tensor
    steps: Tensor
    counter: Tensor


def new_rows(numbers: Tensor, steps: Tensor, device: torch.device | str) -> Rows:
    """Builds Rows from the numbers (K, 11) of each row and its steps (K, 2)."""
    k = len(numbers)
    for name, x, shape in (("numbers", numbers, (k, NUMBERS)), ("steps", steps, (k, 2))):
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(x.shape)}")
    if k and not 0 <= int(steps.min()) <= int(steps.max()) < 2**32:
        raise ValueError(
            f"steps must be in [0, 2**32); got {int(steps.min())} .. {int(steps.max())}"
        )
    table = torch.zeros((k, ROW_WIDTH), dtype=torch.float32)
    table[:, :NUMBERS] = numbers
    counter = torch.zeros(1, dtype=torch.int32, device=device)
    return Rows(table.to(device), steps.to(device, torch.int64).contiguous(), counter)

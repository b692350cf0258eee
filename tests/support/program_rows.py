"""Rows of a sampler program for tests of kernels."""

from __future__ import annotations

import torch
from ncsn_fast.kernels.rows import Rows, new_rows
from torch import Tensor


def rows_of(
    coefficients: Tensor,
    c_ref: Tensor,
    steps: Tensor,
    device: torch.device | str,
    inputs: tuple[float, float] | Tensor = (2.0, -1.0),
) -> Rows:
    """Rows from (K, 8) coefficients, or (K, 6) without constants, (K,) scales of known pixels.

    inputs: scale and shift of the network's next input, for all rows or (K, 2).
    """
    k, given = coefficients.shape
    constants = torch.zeros(k, 8 - given)
    affine = torch.as_tensor(inputs).expand(k, 2)
    numbers = torch.cat([coefficients, constants, c_ref[:, None], affine], dim=1)
    return new_rows(numbers, steps, device)

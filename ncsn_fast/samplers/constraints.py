"""Constraints: known parts of samples, imposed on the chains at a noise level.

Known pixels in a program are part of its rows (program.py), which the fused update executes. A
Constraint covers everything else: other knowledge (grey values of colours, averages of pixels), and
samplers that are not programs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import torch
from torch import Tensor

from ncsn_fast import ops
from ncsn_fast.ops import reference
from ncsn_fast.ops.noise import Stream
from ncsn_fast.samplers.program import Chains, FusedUpdate, Program


class Constraint(Protocol):
    """Measurements of some samples, other than known pixels, and how to impose them."""

    def rows(self, index: Tensor, device: torch.device) -> Constraint:
        """Returns the constraint of the samples in these rows (B,), on a device."""

    def impose(self, x: Tensor, sigma: float, z: Tensor | None) -> Tensor:
        """Returns x (B, ...) with the constraint imposed at noise level sigma.

        z is the noise, None at sigma = 0.
        """


class ConstrainedUpdate(FusedUpdate):
    """Fused update, followed by a constraint wherever the program imposes known pixels."""

    def __init__(self, constraint: Constraint) -> None:
        self.constraint = constraint

    def begin(self, chains: Chains, program: Program) -> None:
        self._impose(chains, *program.imposition(0))

    def row(self, chains: Chains, f: Tensor, program: Program, k: int) -> None:
        super().row(chains, f, program, k)
        self._impose(chains, *program.imposition(k + 1))

    def _impose(self, chains: Chains, scale: float, step: int) -> None:
        if not math.isnan(scale):
            chains.x.copy_(impose(self.constraint, chains, chains.x, scale, step))


def impose(constraint: Constraint, chains: Chains, x: Tensor, sigma: float, step: int) -> Tensor:
    """Returns x with a constraint imposed at noise level sigma, with noise of stream 2."""
    z = None
    if sigma:
        shape = tuple(x.shape[1:])
        z = ops.normal(chains.seed, chains.samples, Stream.REFERENCE, step, shape)
    return constraint.impose(x, sigma, z)


@dataclasses.dataclass(frozen=True)
class KnownPixels:
    """Constraint on known pixels; mask and known are (n, C, H, W)."""

    mask: Tensor
    known: Tensor

    def rows(self, index: Tensor, device: torch.device) -> KnownPixels:
        return KnownPixels(self.mask[index].to(device), self.known[index].to(device))

    def impose(self, x: Tensor, sigma: float, z: Tensor | None) -> Tensor:
        return reference.impose_known(x, self.mask, self.known, sigma, z)

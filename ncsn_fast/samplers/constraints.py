"""What is known of samples, and how it is imposed on their chains at a noise level.

Known pixels of a table are a part of its rows (program.py), which the fused update executes. What
else is known (colours' grey, averages of pixels), and what samplers that are no tables impose, is a
Constraint.
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
    """What is known of some samples, beside pixels: measurements, and how they are imposed."""

    def rows(self, index: Tensor, device: torch.device) -> Constraint:
        """That of the samples in these rows (B,), on a device."""

    def impose(self, x: Tensor, sigma: float, z: Tensor | None) -> Tensor:
        """x (B, ...) with what is known put in at noise level sigma; z: the noise, None at 0."""


class ConstrainedUpdate(FusedUpdate):
    """The fused update, and after it a constraint where the program imposes known pixels."""

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
    """x with a constraint imposed at noise level sigma, by noise of stream 2."""
    z = None
    if sigma:
        shape = tuple(x.shape[1:])
        z = ops.normal(chains.seed, chains.samples, Stream.REFERENCE, step, shape)
    return constraint.impose(x, sigma, z)


@dataclasses.dataclass(frozen=True)
class KnownPixels:
    """Pixels that are known, as a Constraint; mask and known are (n, C, H, W)."""

    mask: Tensor
    known: Tensor

    def rows(self, index: Tensor, device: torch.device) -> KnownPixels:
        return KnownPixels(self.mask[index].to(device), self.known[index].to(device))

    def impose(self, x: Tensor, sigma: float, z: Tensor | None) -> Tensor:
        return reference.impose_known(x, self.mask, self.known, sigma, z)

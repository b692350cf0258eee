"""What samplers that are no tables share: the network call, the noise, the result.

They are functions of `score(x, sigma)`, grad log p_sigma at x (B, ...) with one sigma per sample
(B,), and of standard normals `draw(stream, step)`, shape of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ncsn_fast import noise, ops
from ncsn_fast.noise import Stream

Score = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[Stream, int], Tensor]


class Result(NamedTuple):
    """x: final states, shape of the initial ones.   nfe: (B,) int64, evaluations per sample."""

    x: Tensor
    nfe: Tensor


class SolverError(RuntimeError):
    """An adaptive solver that cannot reach its end; the message says where it stopped."""


def contract_noise(seed: int, samples: Tensor, shape: tuple[int, ...]) -> Draw:
    """Normals (B, *shape) float32 of sample indices (B,), by the contract of ncsn_fast.noise."""
    noise.check_uint32("seed", seed)
    return lambda stream, step: ops.normal(seed, samples, stream, step, shape)


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """(B,) as (B, 1, ...) in the type of x, to broadcast against it."""
    return value.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def rms(x: Tensor) -> Tensor:
    """Root of the mean square of each sample: (B, ...) -> (B,) float64."""
    return x.flatten(1).double().square().mean(dim=1).sqrt()

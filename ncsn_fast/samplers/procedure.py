"""What samplers that are no tables share: the network call, the noise, the result.

They are functions of `score(x, sigma)`, grad log p_sigma at x (B, ...) with one sigma per sample
(B,), and of standard normals `draw(stream, step)`, shape of x.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ncsn_fast import ops
from ncsn_fast.ops import noise
from ncsn_fast.ops.noise import Stream
from ncsn_fast.samplers.program import Chains, Column

Score = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[Stream, int], Tensor]
# (x, sigma, step): what is known of the samples, imposed on x at noise level sigma.
Constrain = Callable[[Tensor, float, int], Tensor]
# (evaluations done, largest noise level that is left, states), after every step.
OnStep = Callable[[int, float, Tensor], object]


class Result(NamedTuple):
    """x: final states, shape of the initial ones.   nfe: (B,) int64, evaluations per sample."""

    x: Tensor
    nfe: Tensor


class SolverError(RuntimeError):
    """An adaptive solver that cannot reach its end; the message says where it stopped.

    Attributes:
        row: the first sample of the batch that did not.
    """

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


def stopped(what: str, lost: Tensor, rows: Tensor, t: Tensor, h: Tensor) -> SolverError:
    """The error of an adaptive solver, for samples that are lost (B,).

    Args:
        rows: which rows of the whole batch the samples are.   t, h: their time and step.
    """
    i = int(lost.nonzero()[0])
    return SolverError(
        f"{what}: {int(lost.sum())} samples, the first of them row {int(rows[i])} at "
        f"t={float(t[i]):.6g} with step {float(h[i]):.3g}; looser tolerances help, unless the "
        "score is wrong",
        int(rows[i]),
    )


class Guide(Protocol):
    """A change of the score, for some samples: guidance by a classifier, by measurements, ...."""

    def __len__(self) -> int:
        """How many samples it is for."""

    def rows(self, index: Tensor, device: torch.device) -> Guide:
        """The guide of the samples in these rows (B,), on a device."""

    def score(self, score: Score, x: Tensor, sigma: Tensor) -> Tensor:
        """The score that stands for score(x, sigma); x (B, ...), sigma (B,)."""


def check_guide(guide: Guide | None, n: int) -> None:
    """ValueError unless a guide, if there is one, is for n samples."""
    if guide is not None and len(guide) != n:
        raise ValueError(f"a guide has one row per sample; expected {n}, got {len(guide)}")


@dataclasses.dataclass(frozen=True)
class Procedure:
    """A sampler that is no table, ready to run: what `Program` is for those that are.

    Attributes:
        name: the method.
        sigma: (L,) its noise levels, descending; the two ends where it chooses its own.
        nfe: evaluations per sample, or None where they show afterwards and differ by sample.
        solve: runs the states of chains down to the end.
        draws_noise: whether it draws any on its way.   constrains: whether `solve` can impose what
            is known of the samples; else its third argument must be None.
    """

    name: str
    sigma: Column
    nfe: int | None
    solve: Callable[[Score, Chains, Constrain | None, OnStep | None], Result]
    draws_noise: bool = True
    constrains: bool = False
    initial: ClassVar[Literal["prior"]] = "prior"


def chains_noise(chains: Chains) -> Draw:
    """Noise of chains by the contract; of two streams where they have weights (interpolation)."""
    first = contract_noise(chains.seed, chains.samples, tuple(chains.x.shape[1:]))
    if chains.noise_weights is None:
        return first
    w = per_sample(chains.noise_weights[:, 0], chains.x)
    v = per_sample(chains.noise_weights[:, 1], chains.x)
    return lambda stream, step: w * first(stream, step) + v * first(Stream.SECOND, step)


def contract_noise(seed: int, samples: Tensor, shape: tuple[int, ...]) -> Draw:
    """Normals (B, *shape) float32 of sample indices (B,), by the contract of ops/noise.py."""
    noise.check_uint32("seed", seed)
    return lambda stream, step: ops.normal(seed, samples, stream, step, shape)


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """(B,) as (B, 1, ...) in the type of x, to broadcast against it."""
    return value.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def rms(x: Tensor) -> Tensor:
    """Root of the mean square of each sample: (B, ...) -> (B,) float64."""
    return x.flatten(1).double().square().mean(dim=1).sqrt()

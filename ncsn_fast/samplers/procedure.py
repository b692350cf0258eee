"""Procedures, the samplers that are not programs: their interface, noise, guides and results.

A procedure is a function of `score(x, sigma)`, grad log p_sigma at x (B, ...) with one sigma per
sample (B,), and of standard normals `draw(stream, step)`, shape of x.
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
# (x, sigma, step) -> x with the known parts imposed at noise level sigma.
Constrain = Callable[[Tensor, float, int], Tensor]
# (evaluations done, largest remaining noise level, states), called after every step.
OnStep = Callable[[int, float, Tensor], object]


class Result(NamedTuple):
    """Result of a procedure.

    x: final states, shape of the initial ones.   nfe: (B,) int64, evaluations per sample.
    """

    x: Tensor
    nfe: Tensor


class SolverError(RuntimeError):
    """Error of an adaptive solver that cannot reach its end; the message says where it stopped.

    Attributes:
        row: first sample of the batch that failed.
    """

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


def stopped(what: str, lost: Tensor, rows: Tensor, t: Tensor, h: Tensor) -> SolverError:
    """Returns the error of an adaptive solver, for failed samples `lost` (B,).

    Args:
        rows: their row indices in the full batch.   t, h: their time and step.
    """
    i = int(lost.nonzero()[0])
    return SolverError(
        f"{what}: {int(lost.sum())} samples, the first of them row {int(rows[i])} at "
        f"t={float(t[i]):.6g} with step {float(h[i]):.3g}; looser tolerances help, unless the "
        "score is wrong",
        int(rows[i]),
    )


class Guide(Protocol):
    """Modification of the score for some samples: guidance by a classifier or by measurements."""

    def __len__(self) -> int:
        """Returns the number of samples that the guide is for."""

    def rows(self, index: Tensor, device: torch.device) -> Guide:
        """Returns the guide of the samples in these rows (B,), on a device."""

    def score(self, score: Score, x: Tensor, sigma: Tensor) -> Tensor:
        """Computes the guided score that replaces score(x, sigma); x (B, ...), sigma (B,)."""


def check_guide(guide: Guide | None, n: int) -> None:
    """Raises TypeError or ValueError if a guide is given that is none, or not for n samples."""
    if guide is not None and not (hasattr(guide, "score") and hasattr(guide, "rows")):
        raise TypeError(
            f"a guide is one of samplers/guidance.py, or has their form; got {type(guide).__name__}"
        )
    if guide is not None and len(guide) != n:
        raise ValueError(f"a guide has one row per sample; expected {n}, got {len(guide)}")


@dataclasses.dataclass(frozen=True)
class Procedure:
    """Sampler that is not a program, ready to run; counterpart of `Program`.

    Attributes:
        name: the method.
        sigma: (L,) its noise levels, descending; only the two ends if it chooses its own steps.
        nfe: evaluations per sample, or None if they vary by sample and are known only afterwards.
        solve: runs the chains' states down to the end.
        draws_noise: whether it draws noise on its way.
        constrains: whether `solve` can impose known parts of the samples; if not, its third
            argument must be None.
    """

    name: str
    sigma: Column
    nfe: int | None
    solve: Callable[[Score, Chains, Constrain | None, OnStep | None], Result]
    draws_noise: bool = True
    constrains: bool = False
    initial: ClassVar[Literal["prior"]] = "prior"
    mean: ClassVar[None] = None


def chains_noise(chains: Chains) -> Draw:
    """Returns the chains' noise by the contract; weighted from two streams for interpolation."""
    first = contract_noise(chains.seed, chains.samples, tuple(chains.x.shape[1:]))
    if chains.noise_weights is None:
        return first
    w = per_sample(chains.noise_weights[:, 0], chains.x)
    v = per_sample(chains.noise_weights[:, 1], chains.x)
    return lambda stream, step: w * first(stream, step) + v * first(Stream.SECOND, step)


def contract_noise(seed: int, samples: Tensor, shape: tuple[int, ...]) -> Draw:
    """Returns normals (B, *shape) float32 of samples (B,) by the noise contract (ops/noise.py)."""
    noise.check_uint32("seed", seed)
    return lambda stream, step: ops.normal(seed, samples, stream, step, shape)


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """Reshapes (B,) to (B, 1, ...), in the dtype of x, to broadcast against x."""
    return value.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def rms(x: Tensor) -> Tensor:
    """Computes the root mean square of each sample: (B, ...) -> (B,) float64."""
    return x.flatten(1).double().square().mean(dim=1).sqrt()

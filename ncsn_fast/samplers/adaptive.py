"""Adaptive solver of the reverse VE-SDE (Jolicoeur-Martineau et al. 2021, "Gotta go fast").

Time t falls from 1 to t_end, sigma(t) = sigma_min (sigma_max / sigma_min)^t, g(t)^2 = dsigma^2/dt.
An attempt with step h, score s and one z for both halves:
    k1 = h g(t)^2 s(x, t) + g(t) sqrt(h) z                 x'  = x + k1
    k2 = h g(t-h)^2 s(x', t-h) + g(t-h) sqrt(h) z          x'' = x + (k1 + k2) / 2
    E  = rms((k2 - k1) / 2 / max(atol, rtol max(|x'_prev|, |x'|)))      over a sample
is accepted if E <= 1: then x = x'', x'_prev = x', t = t - h. In both cases the next step is
0.9 h E^(-0.9), limited to the remaining time. The last step is x + sigma^2 s(x, sigma). An attempt
takes two evaluations. Step size, acceptance and number of evaluations are per sample, so a sample
does not depend on its batch.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ncsn_fast.ops.noise import Stream
from ncsn_fast.samplers.procedure import (
    Draw,
    OnStep,
    Result,
    Score,
    SolverError,
    per_sample,
    rms,
    stopped,
)

FIRST_STEP = 0.01  # as in the paper
SAFETY, EXPONENT = 0.9, 0.9
T_END = 1e-5
SPACING = 1e-6  # a sample this close to t_end is done


@dataclasses.dataclass
class _State:
    """Running samples: x and the previous x' (B, ...), all else (B,); t and h are float64."""

    rows: Tensor  # their row indices in the full batch
    t: Tensor
    h: Tensor
    x: Tensor
    previous: Tensor
    nfe: Tensor
    lost: Tensor  # whether an attempt had a non-finite error

    def running(self, t_end: float) -> Tensor:
        return (self.t - t_end >= SPACING) & ~self.lost

    def take(self, keep: Tensor) -> _State:
        fields = dataclasses.fields(self)
        return _State(**{field.name: getattr(self, field.name)[keep] for field in fields})


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """Noise level sigma(t) and diffusion g(t) of a geometric VE-SDE."""

    sigma_min: float
    rate: float  # log(sigma_max / sigma_min)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(self.rate * t)

    def g(self, t: Tensor) -> Tensor:
        return math.sqrt(2 * self.rate) * self.sigma(t)


def adaptive(
    score: Score,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    draw: Draw,
    *,
    rtol: float = 0.02,
    atol: float = 1 / 256,
    denoise: bool = True,
    t_end: float = T_END,
    first_step: float = FIRST_STEP,
    max_steps: int = 10_000,
    compact: bool = True,
    on_step: OnStep | None = None,
) -> Result:
    """Samples from states x (B, ...) at sigma_max; see the module docstring for the method.

    Published (CIFAR-10 in [0, 1], VE, atol = 1/256): rtol 0.01, 0.02, 0.05, 0.1 took 738, 490, 271,
    170 evaluations on average.

    Args:
        draw: noise: stream 0, step = number of the attempt, shape of x.
        denoise: end with x + sigma^2 score(x, sigma) at t_end, for one more evaluation.
        max_steps: most attempts of any sample.
        compact: drop finished samples from the batch, so that `score` sees fewer and fewer; else it
            sees all of them until the slowest is done. The result is the same.
        on_step: called after every attempt.

    Raises:
        SolverError: max_steps did not suffice, or a state is not finite.
    """
    _check(sigma_min, sigma_max, rtol, atol, t_end, first_step, max_steps)
    schedule = _Schedule(sigma_min, math.log(sigma_max / sigma_min))
    t = torch.ones(len(x), dtype=torch.float64, device=x.device)
    h, rows = torch.full_like(t, min(first_step, 1 - t_end)), torch.arange(len(x), device=x.device)
    state = _State(rows, t, h, x, x, torch.zeros_like(rows), torch.zeros_like(t).bool())
    result, nfe = x.clone(), torch.zeros_like(rows)
    attempts = 0
    while bool((running := state.running(t_end)).any()):
        if attempts == max_steps:
            raise _failure(state, running, f"max_steps={max_steps} attempts did not suffice")
        z = draw(Stream.SAMPLER, attempts).to(x.dtype)[state.rows]
        _attempt(score, schedule, state, z, t_end, rtol, atol)
        attempts += 1
        if on_step is not None:
            on_step(2 * attempts, float(schedule.sigma(state.t.max())), state.x)
        if compact and not bool((running := state.running(t_end)).all()):
            done = state.take(~running)
            result[done.rows], nfe[done.rows] = done.x, done.nfe
            if bool(done.lost.any()):
                break
            state = state.take(running)
    if bool(state.lost.any()):
        raise _failure(state, state.lost, "the state is no longer finite")
    result[state.rows], nfe[state.rows] = state.x, state.nfe
    if denoise and len(x):
        sigma = schedule.sigma(torch.full_like(t, t_end)).to(x.dtype)
        result, nfe = result + per_sample(sigma**2, x) * score(result, sigma), nfe + 1
    return Result(result, nfe)


def _attempt(
    score: Score,
    schedule: _Schedule,
    state: _State,
    z: Tensor,
    t_end: float,
    rtol: float,
    atol: float,
) -> None:
    """Attempts one step of every running sample, in place."""
    running, x = state.running(t_end), state.x
    ahead = state.t - state.h

    def change(t: Tensor, x: Tensor) -> Tensor:
        g = schedule.g(t)
        s = score(x, schedule.sigma(t).to(x.dtype))
        return per_sample(state.h * g**2, x) * s + per_sample(g * state.h.sqrt(), x) * z

    k1 = change(state.t, x)
    x1 = x + k1
    k2 = change(ahead, x1)
    allowed = (rtol * torch.maximum(state.previous.abs(), x1.abs())).clamp(min=atol)
    error = rms((k2 - k1) / 2 / allowed)

    accepted = running & (error <= 1)
    keep = per_sample(accepted, x).bool()
    state.x = torch.where(keep, x + (k1 + k2) / 2, x)
    state.previous = torch.where(keep, x1, state.previous)
    state.t = torch.where(accepted, ahead, state.t)
    step = torch.minimum(state.t - t_end, SAFETY * state.h * error**-EXPONENT)
    state.h = torch.where(running, step, state.h)
    state.nfe = state.nfe + 2 * running
    state.lost = state.lost | (running & ~torch.isfinite(error))


def _check(
    sigma_min: float,
    sigma_max: float,
    rtol: float,
    atol: float,
    t_end: float,
    first_step: float,
    max_steps: int,
) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"expected 0 < sigma_min < sigma_max < inf; got {sigma_min} and {sigma_max}"
        )
    if not (0 <= rtol < math.inf and 0 < atol < math.inf):
        raise ValueError(f"expected rtol >= 0 and atol > 0; got {rtol} and {atol}")
    if not (0 <= t_end < 1 - SPACING and first_step > 0 and max_steps >= 1):
        raise ValueError(
            "expected 0 <= t_end < 1, first_step > 0 and max_steps >= 1; "
            f"got {t_end}, {first_step} and {max_steps}"
        )


def _failure(state: _State, lost: Tensor, what: str) -> SolverError:
    return stopped(what, lost, state.rows, state.t, state.h)

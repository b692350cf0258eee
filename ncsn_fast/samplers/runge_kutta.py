"""Adaptive Runge-Kutta solver for batches, with independent steps per sample.

Dormand & Prince's pair 5(4), first same as last (J. Comp. Appl. Math. 6, 1980): an attempt takes
six evaluations and keeps the fifth-order solution. Its error
    E = rms(h * sum_i e_i k_i / (atol + rtol max(|y|, |y'|)))    over the elements of one sample
must be below 1; the next step is h * clip(0.9 E^(-1/5), 0.2, 10), and does not grow right after a
rejection. The first step is that of Hairer, Norsett & Wanner (Solving ordinary differential
equations I, section II.4). These are the rules of SciPy's RK45, so a single sample takes the same
steps as in SciPy. For a batch, SciPy couples the samples through the norm; this solver does not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ncsn_fast.samplers.procedure import SolverError, per_sample, rms, stopped

# Time (B,) float64 and state (B, ...) -> slope, shape of the state.
Slope = Callable[[Tensor, Tensor], Tensor]

NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
FIFTH = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
# Fifth-order weights minus fourth-order weights.
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
EVALUATIONS = 6  # per attempt
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0


class Solution(NamedTuple):
    """Solution of an ODE.

    y: state at the end (B, ...).   nfe: (B,) int64, slope evaluations per sample.
    """

    y: Tensor
    nfe: Tensor


class _Tolerance(NamedTuple):
    rtol: float
    atol: float

    def norm(self, error: Tensor, *states: Tensor) -> Tensor:
        """Computes rms(error / (atol + rtol max |state|)) of each sample, (B,) float64."""
        largest = states[0].abs()
        for state in states[1:]:
            largest = torch.maximum(largest, state.abs())
        return rms(error / (self.atol + self.rtol * largest))


@dataclasses.dataclass
class _State:
    """State of a running batch: y (B, ...) with slope k at t; all else (B,).

    t and h are float64, h is positive; `rejected` marks samples whose last attempt was rejected,
    `stuck` those whose step became too small to change t.
    """

    rows: Tensor  # their row indices in the full batch
    t: Tensor
    y: Tensor
    k: Tensor
    h: Tensor
    nfe: Tensor
    rejected: Tensor
    running: Tensor
    stuck: Tensor

    def take(self, keep: Tensor) -> _State:
        fields = dataclasses.fields(self)
        return _State(**{field.name: getattr(self, field.name)[keep] for field in fields})


def solve(
    slope: Slope,
    y: Tensor,
    start: float,
    stop: float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    first_step: float | None = None,
    max_steps: int = 10_000,
    compact: bool = False,
    on_attempt: Callable[[int, Tensor, Tensor], object] | None = None,
) -> Solution:
    """Integrates dy/dt = slope(t, y) from t = start to t = stop, forward or backward.

    All tensors stay on the device of y; the host reads one flag per attempt (two if compacting). A
    finished sample does not change any more, whatever `slope` returns for it.

    Args:
        y: (B, ...) float32 or float64; the arithmetic has its dtype.
        rtol, atol: relative and absolute tolerance of each sample's step.
        first_step: size of the first attempt; None chooses it, for one more evaluation.
        max_steps: most attempts, accepted and rejected, of any sample.
        compact: drop finished samples from the batch, so that `slope` sees fewer and fewer; for
            slopes that do not depend on a sample's row.
        on_attempt: called with evaluations done, t (B,) and y of the samples still in the batch.

    Raises:
        SolverError: max_steps did not suffice, or a step became too small to change t.
    """
    _check(y, start, stop, rtol, atol, first_step, max_steps)
    if start == stop or len(y) == 0:
        return Solution(y.clone(), torch.zeros(len(y), dtype=torch.int64, device=y.device))
    tolerance = _Tolerance(rtol, atol)
    state = _begin(slope, y, start, stop, tolerance, first_step)
    end, nfe = y.clone(), torch.zeros_like(state.nfe)
    attempts = 0
    while bool(state.running.any()):
        if attempts == max_steps:
            raise _failure(state, f"max_steps={max_steps} attempts did not reach t={stop:.6g}")
        _attempt(slope, state, stop, tolerance)
        attempts += 1
        if on_attempt is not None:
            on_attempt(int(state.nfe.max()), state.t, state.y)
        if compact and not bool((keep := state.running | state.stuck).all()):
            done = state.take(~keep)
            end[done.rows], nfe[done.rows] = done.y, done.nfe
            state = state.take(keep)
    if bool(state.stuck.any()):
        raise _failure(state, "the step became too small to change t")
    end[state.rows], nfe[state.rows] = state.y, state.nfe
    return Solution(end, nfe)


def _begin(
    slope: Slope, y: Tensor, start: float, stop: float, tolerance: _Tolerance, h: float | None
) -> _State:
    """Returns the state at `start`, with the size of its first step."""
    t = torch.full((len(y),), start, dtype=torch.float64, device=y.device)
    k = slope(t, y)
    if k.shape != y.shape:
        raise ValueError(f"slope must have the shape of y, {tuple(y.shape)}; got {tuple(k.shape)}")
    interval = abs(stop - start)
    first = torch.full_like(t, interval if h is None else min(h, interval))
    if h is None:
        first = _first_step(slope, t, y, k, math.copysign(1, stop - start), first, tolerance)
    no = torch.zeros_like(t, dtype=torch.bool)
    nfe = torch.full_like(t, 1 if h is not None else 2, dtype=torch.int64)
    rows = torch.arange(len(y), device=y.device)
    return _State(rows, t, y, k, first, nfe, rejected=no, running=~no, stuck=no)


def _first_step(
    slope: Slope,
    t: Tensor,
    y: Tensor,
    k: Tensor,
    direction: float,
    interval: Tensor,
    tolerance: _Tolerance,
) -> Tensor:
    """Computes Hairer's first step (B,) for an error of order 4; at most the interval."""
    d0, d1 = tolerance.norm(y, y), tolerance.norm(k, y)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).minimum(interval)
    ahead = slope(t + direction * h0, y + per_sample(direction * h0, y) * k)
    d2 = tolerance.norm(ahead - k, y) / h0
    steepest = torch.maximum(d1, d2)
    h1 = torch.where(steepest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), (0.01 / steepest) ** 0.2)
    h = torch.minimum(100 * h0, h1).minimum(interval)
    return torch.where(torch.isfinite(h), h, interval)  # the first attempt will report the error


def _combine(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """Computes sum_i weights_i slopes_i."""
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight:
            total.add_(slope, alpha=weight)
    return total


def _attempt(slope: Slope, state: _State, stop: float, tolerance: _Tolerance) -> None:
    """Attempts one step of every running sample, in place; rejected samples stay."""
    t, y = state.t, state.y
    end = torch.full_like(t, stop)
    smallest = 10 * (torch.nextafter(t, end) - t).abs()
    left = end - t
    reaches = state.h.maximum(smallest) >= left.abs()
    t_new = torch.where(reaches, end, t + torch.sign(left) * state.h.maximum(smallest))
    h = t_new - t
    step = per_sample(h, y)
    slopes = [state.k]
    for node, weights in zip(NODES[1:], STAGES, strict=True):
        slopes.append(slope(t + node * h, y + step * _combine(weights, slopes)))
    y_new = y + step * _combine(FIFTH, slopes)
    slopes.append(slope(t_new, y_new))
    error = tolerance.norm(step * _combine(ERROR, slopes), y, y_new)

    accepted = state.running & (error < 1)
    factor = torch.where(torch.isfinite(error), SAFETY * error**-0.2, SHRINK).clamp(SHRINK, GROW)
    factor = torch.where(accepted & state.rejected, factor.clamp(max=1.0), factor)
    state.h = torch.where(state.running, h.abs() * factor, state.h)
    state.nfe = state.nfe + EVALUATIONS * state.running
    keep = per_sample(accepted, y).bool()
    state.y = torch.where(keep, y_new, y)
    state.k = torch.where(keep, slopes[-1], state.k)
    state.t = torch.where(accepted, t_new, t)
    state.rejected = state.running & ~accepted
    state.stuck = state.stuck | (state.rejected & (state.h < smallest))
    state.running = state.running & ~state.stuck & (state.t != end)


def _check(
    y: Tensor,
    start: float,
    stop: float,
    rtol: float,
    atol: float,
    first_step: float | None,
    max_steps: int,
) -> None:
    if y.dtype not in (torch.float32, torch.float64) or y.ndim < 2:
        raise ValueError(f"y must be (B, ...) float32 or float64; got {tuple(y.shape)} {y.dtype}")
    if not (math.isfinite(start) and math.isfinite(stop)):
        raise ValueError(f"start and stop must be finite; got {start} and {stop}")
    least = 10 * torch.finfo(y.dtype).eps
    if not (least <= rtol < math.inf and 0 <= atol < math.inf):
        raise ValueError(
            f"expected rtol >= {least:.1e} (10 roundings of {y.dtype}) and atol >= 0; "
            f"got {rtol} and {atol}"
        )
    if first_step is not None and not first_step > 0:
        raise ValueError(f"first_step must be positive; got {first_step}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1; got {max_steps}")


def _failure(state: _State, what: str) -> SolverError:
    lost = state.running | state.stuck
    return stopped(what, lost, state.rows, state.t, state.h)

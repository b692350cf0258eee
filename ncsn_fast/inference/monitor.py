"""Monitor of running chains: the progress bar, the check for NaN, the user's callback."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.inference.user_functions import UserFunctions
from ncsn_fast.samplers.procedure import Procedure
from ncsn_fast.samplers.program import Chains, Program

UNITS = 100  # of the progress bar, for a micro-batch of a procedure


class SamplingError(RuntimeError):
    """Error of chains that are no longer finite; the message says which sample and where."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Information passed to the callback after each noise level.

    Attributes:
        level, n_levels: index of the level just finished (the final denoising counts as one), and
            the number of levels; for samplers that choose their steps, the step and 0.
        sigma: its noise level; the largest in the micro-batch if samples differ.
        nfe: network evaluations done per sample.
        samples: (B,) indices of this micro-batch's samples.
        x: a copy of their chains' state (B, C, H, W).
    """

    method: str
    level: int
    n_levels: int
    sigma: float
    nfe: int
    samples: Tensor
    x: Tensor


Callback = Callable[[Progress], None]


@dataclasses.dataclass
class _Check:
    """The chains that were not finite after a level; `lost` is valid once `ready` has happened."""

    level: int
    sigma: float
    lost: Tensor
    ready: torch.cuda.Event | None


class Monitor:
    """Callback of every level or step: advances the bar, checks for NaN, calls the user's callback.

    The result of a check on a GPU is read while the next level runs, so that the GPU never waits.
    With a callback it is read at once, before the callback sees the state.
    """

    def __init__(
        self,
        program: Program | Procedure,
        chains: Chains,
        count: int,
        bar: Any,
        callback: Callback | None,
        user: UserFunctions,
    ) -> None:
        self.program, self.chains, self.count = program, chains, count
        self.bar, self.callback = bar, callback
        self.checks: list[_Check] = []
        self.steps, self.units = 0, 0
        self.user = user
        self.n_levels = 0
        if isinstance(program, Program):
            self.n_levels = int(program.level[-1]) + 1 if program.nfe else 0
        elif program.nfe is not None:
            self.n_levels = len(program.sigma)

    def level_done(self, done: int) -> None:
        """Handles the end of a level, after `done` rows of a table."""
        assert isinstance(self.program, Program)
        level, sigma = int(self.program.level[done - 1]), float(self.program.sigma[done - 1])
        self.bar.update()
        self._tell(level, sigma, done, self.chains.x)

    def step_done(self, nfe: int, sigma: float, x: Tensor) -> None:
        """Handles the end of a procedure's step, inside its engine's context."""
        first, last = float(self.program.sigma[0]), float(self.program.sigma[-1])
        way = math.log(first / last)
        share = math.log(first / max(sigma, last)) / way if way else 1.0
        self._advance(int(UNITS * min(max(share, 0.0), 1.0)))
        with torch.inference_mode(False):
            self._tell(self.steps, sigma, nfe, x)
        self.steps += 1

    def finish(self) -> None:
        """Handles the end of a procedure."""
        self._advance(UNITS)
        self.checks.append(self._look(self.steps, float(self.program.sigma[-1]), self.chains.x))

    def _advance(self, units: int) -> None:
        self.bar.update(max(units - self.units, 0))
        self.units = max(units, self.units)

    def _tell(self, level: int, sigma: float, nfe: int, x: Tensor) -> None:
        self.bar.set_postfix(sigma=f"{sigma:.3g}", refresh=False)
        self.checks.append(self._look(level, sigma, x))
        self.check(all_but=0 if self.callback or self.checks[-1].ready is None else 1)
        if self.callback is not None:
            samples = self.chains.samples[: self.count].clone().cpu()
            state = x[: self.count].clone()
            progress = Progress(self.program.name, level, self.n_levels, sigma, nfe, samples, state)
            with self.user.watch(callback=True):
                self.callback(progress)

    def check(self, all_but: int = 0) -> None:
        """Raises SamplingError if a chain was lost in any level but the last `all_but`."""
        while len(self.checks) > all_but:
            seen = self.checks.pop(0)
            if seen.ready is not None:
                seen.ready.synchronize()
            if bool(seen.lost.any()):
                index = int(self.chains.samples.cpu()[seen.lost != 0][0])
                raise SamplingError(
                    f"sample {index} of seed {self.chains.seed} is no longer finite at level "
                    f"{seen.level} (sigma {seen.sigma:.4g}); the step size is too large for this "
                    "model, or its weights are damaged"
                )

    def _look(self, level: int, sigma: float, x: Tensor) -> _Check:
        lost = self.chains.nonfinite
        if lost is None:
            lost = ~torch.isfinite(x).flatten(1).all(dim=1)
        if lost.is_cpu:
            return _Check(level, sigma, lost.clone(), None)
        copied = torch.empty(lost.shape, dtype=lost.dtype, pin_memory=True)
        copied.copy_(lost, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(lost.device))
        return _Check(level, sigma, copied, ready)

"""One call's worth of chains: cut into micro-batches of a fixed size, run, watched and reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ncsn_fast.engines.base import Engine
from ncsn_fast.samplers.program import Chains, Program, initial_state


class SamplingError(RuntimeError):
    """Chains that left the finite numbers; the message says which sample and where."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a callback is told after each noise level.

    Attributes:
        level, n_levels: index of the level just finished (the final denoise counts as one), and how
            many there are.   sigma: its noise level.   nfe: network evaluations done per sample.
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


@dataclasses.dataclass(frozen=True)
class Report:
    """How a call went: network evaluations per sample, images, seconds of work, what did it."""

    method: str
    nfe: int
    n: int
    seconds: float
    engine: str
    dtype: str
    batch_size: int


@dataclasses.dataclass
class Job:
    """All chains of a call; every field has n rows.

    Attributes:
        samples: (n,) int64, the sample index that keys each chain's noise.
        noise_weights, mask, known: as in Chains.   init: initial state, or None for the program's.
    """

    samples: Tensor
    noise_weights: Tensor | None = None
    mask: Tensor | None = None
    known: Tensor | None = None
    init: Tensor | None = None

    def chains(self, rows: Tensor, program: Program, seed: int, engine: Engine) -> Chains:
        """The chains of some rows, at their start, on the engine's device."""

        def take(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[rows].to(engine.device)

        samples = self.samples[rows].to(engine.device)
        x = take(self.init)
        with engine.context():
            if x is None:
                x = initial_state(program, seed, samples, engine.model.image_shape)
            return Chains(
                x=x.clone(memory_format=torch.contiguous_format),
                seed=seed,
                samples=samples,
                noise_weights=take(self.noise_weights),
                mask=take(self.mask),
                known=take(self.known),
            )


def run_job(
    engine: Engine,
    program: Program,
    job: Job,
    seed: int,
    *,
    progress: bool,
    callback: Callback | None = None,
    shrink: Callable[[Engine, Exception], Engine] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (sample indices, final states on the CPU) of each micro-batch.

    The last micro-batch is padded, not shrunk, so that results do not depend on how work was split.

    Args:
        shrink: called when a GPU's memory does not suffice; returns an engine for smaller
            micro-batches, with which the work goes on where it was, or raises.
    """
    n, first = len(job.samples), 0
    with tqdm(unit="level", disable=not progress, dynamic_ncols=True) as bar:
        while first < n:
            size, n_chunks = engine.batch_size, len(engine.chunks(program))
            bar.total = bar.n + -(-(n - first) // size) * n_chunks
            count, done = min(size, n - first), bar.n
            rows = torch.arange(first, first + size).clamp(max=n - 1)
            try:
                chains = job.chains(rows, program, seed, engine)
                watch = _Watch(program, chains, count, bar, callback)
                x = engine.run(program, chains, on_level=watch)[:count].to("cpu")
                watch.check()
            except RuntimeError as error:
                chains = watch = None  # type: ignore[assignment]  # let go of what they hold
                if shrink is None or not _is_out_of_memory(error):
                    raise
                engine = shrink(engine, error.with_traceback(None))
                bar.n = done
                continue
            yield job.samples[first : first + count], x
            first += count


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU's memory did not suffice; cuDNN and the driver say so in words alone."""
    words = ("out of memory", "unable to find an engine")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error).lower() for w in words)


@dataclasses.dataclass
class _Sighting:
    """Which chains were lost at the end of a level; `lost` holds once `ready` has happened."""

    level: int
    sigma: float
    lost: Tensor
    ready: torch.cuda.Event | None


class _Watch:
    """After each level: advances the bar, refuses NaN, tells the callback.

    A GPU is asked about a level when the next one is under way, so that it never waits for the
    answer; with a callback at once, before the callback sees the state.
    """

    def __init__(
        self, program: Program, chains: Chains, count: int, bar: Any, callback: Callback | None
    ) -> None:
        self.program, self.chains, self.count = program, chains, count
        self.bar, self.callback = bar, callback
        self.n_levels = int(program.level[-1]) + 1 if program.nfe else 0
        self.sightings: list[_Sighting] = []

    def __call__(self, done: int) -> None:
        level, sigma = int(self.program.level[done - 1]), float(self.program.sigma[done - 1])
        self.bar.set_postfix(sigma=f"{sigma:.3g}", refresh=False)
        self.bar.update()
        self.sightings.append(self._look(level, sigma))
        self.check(all_but=0 if self.callback or self.sightings[-1].ready is None else 1)
        if self.callback is not None:
            samples = self.chains.samples[: self.count].clone().cpu()
            x = self.chains.x[: self.count].clone()
            self.callback(
                Progress(self.program.name, level, self.n_levels, sigma, done, samples, x)
            )

    def check(self, all_but: int = 0) -> None:
        """SamplingError if a chain was lost in any level but the last `all_but`."""
        while len(self.sightings) > all_but:
            seen = self.sightings.pop(0)
            if seen.ready is not None:
                seen.ready.synchronize()
            if bool(seen.lost.any()):
                index = int(self.chains.samples.cpu()[seen.lost != 0][0])
                raise SamplingError(
                    f"sample {index} of seed {self.chains.seed} is no longer finite at level "
                    f"{seen.level} (sigma {seen.sigma:.4g}); the step size is too large for this "
                    "model, or its weights are damaged"
                )

    def _look(self, level: int, sigma: float) -> _Sighting:
        lost = self.chains.nonfinite
        if lost is None:
            lost = ~torch.isfinite(self.chains.x).flatten(1).all(dim=1)
        if lost.is_cpu:
            return _Sighting(level, sigma, lost.clone(), None)
        copied = torch.empty(lost.shape, dtype=lost.dtype, pin_memory=True)
        copied.copy_(lost, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(lost.device))
        return _Sighting(level, sigma, copied, ready)


def make_report(engine: Engine, program: Program, n: int, seconds: float) -> Report:
    """Report of a call that took so many seconds."""
    return Report(
        program.name, program.nfe, n, seconds, engine.name, engine.dtype, engine.batch_size
    )


def default_batch_size(n: int, shape: tuple[int, int, int], device: torch.device) -> int:
    """The smallest power of two that holds n images, as far as memory for activations allows."""
    pixels = 65_536 if device.type == "cpu" else 524_288
    most = max(1, min(256, pixels // (shape[1] * shape[2])))
    most = 1 << (most.bit_length() - 1)
    return min(most, 1 << max(0, n - 1).bit_length())

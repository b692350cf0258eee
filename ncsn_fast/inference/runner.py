"""One call's worth of chains: cut into micro-batches of a fixed size, run and reported."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ncsn_fast.engines.base import Engine
from ncsn_fast.inference.monitor import UNITS, Callback, Monitor, Progress, SamplingError
from ncsn_fast.samplers.constraints import ConstrainedUpdate, Constraint, KnownPixels, impose
from ncsn_fast.samplers.procedure import Guide, Procedure, SolverError
from ncsn_fast.samplers.program import Chains, Program, initial_state


@dataclasses.dataclass(frozen=True)
class Report:
    """How a call went: network evaluations, images, seconds of work, what did it.

    Attributes:
        nfe: network evaluations per sample; their mean, where samples differ.
        nfe_most: the largest of any sample, which is what its micro-batch took.
    """

    method: str
    nfe: int | float
    n: int
    seconds: float
    engine: str
    dtype: str
    batch_size: int
    nfe_most: int


@dataclasses.dataclass
class Job:
    """All chains of a call; every field has n rows.

    Attributes:
        samples: (n,) int64, the sample index that keys each chain's noise.
        noise_weights, mask, known: as in Chains.   init: initial state, or None for the program's.
        constraint: what is known beside pixels, imposed where the sampler imposes known pixels.
        guide: what changes the score.
    """

    samples: Tensor
    noise_weights: Tensor | None = None
    mask: Tensor | None = None
    known: Tensor | None = None
    init: Tensor | None = None
    constraint: Constraint | None = None
    guide: Guide | None = None

    def chains(
        self, rows: Tensor, program: Program | Procedure, seed: int, engine: Engine
    ) -> Chains:
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


class MicroBatch(NamedTuple):
    """A micro-batch: sample indices (B,), final states on the CPU, evaluations of each (B,)."""

    samples: Tensor
    x: Tensor
    nfe: Tensor


def run(
    engine: Engine,
    program: Program | Procedure,
    job: Job,
    seed: int,
    *,
    progress: bool,
    callback: Callback | None = None,
    shrink: Callable[[Engine, Exception], Engine] | None = None,
) -> Iterator[MicroBatch]:
    """Yields what was drawn, micro-batch by micro-batch.

    The last micro-batch is padded, not shrunk, so that results do not depend on how work was split.

    Args:
        shrink: called when a GPU's memory does not suffice; returns an engine for smaller
            micro-batches, with which the work goes on where it was, or raises.
    """
    n, first = len(job.samples), 0
    unit = "level" if isinstance(program, Program) else "%"
    with tqdm(unit=unit, disable=not progress, dynamic_ncols=True) as bar:
        while first < n:
            size, units = engine.batch_size, _units(engine, program)
            bar.total = bar.n + -(-(n - first) // size) * units
            count, done = min(size, n - first), bar.n
            rows = torch.arange(first, first + size).clamp(max=n - 1)
            try:
                chains = job.chains(rows, program, seed, engine)
                chains.count = count
                monitor = Monitor(program, chains, count, bar, callback)
                x, nfe = _run(engine, program, job, rows, chains, monitor)
                drawn = MicroBatch(job.samples[first : first + count], x[:count].cpu(), nfe[:count])
                monitor.check()
            except RuntimeError as error:
                chains = monitor = None  # type: ignore[assignment]  # let go of what they hold
                if shrink is None or not _is_out_of_memory(error):
                    raise
                engine = shrink(engine, error.with_traceback(None))
                bar.n = done
                continue
            yield drawn
            first += count


def _units(engine: Engine, program: Program | Procedure) -> int:
    """Of the progress bar, for a micro-batch."""
    return len(engine.chunks(program)) if isinstance(program, Program) else UNITS


def _run(
    engine: Engine,
    program: Program | Procedure,
    job: Job,
    rows: Tensor,
    chains: Chains,
    monitor: Monitor,
) -> tuple[Tensor, Tensor]:
    """Final states of a micro-batch, and the evaluations of each sample (B,) on the CPU."""
    guide = None if job.guide is None else job.guide.rows(rows, engine.device)
    constraint = None if job.constraint is None else job.constraint.rows(rows, engine.device)
    if isinstance(program, Program):
        if constraint is not None and program.reference_noise is None:
            raise ValueError(
                f"this {program.name} imposes nothing; see samplers/program_transforms.inpainting"
            )
        update = None if constraint is None else ConstrainedUpdate(constraint)
        options: dict[str, Any] = {"update": update, "guide": guide, "on_level": monitor.level_done}
        x = engine.run(program, chains, **options)
        return x, torch.full((len(x),), program.nfe)
    if constraint is None and chains.mask is not None and chains.known is not None:
        constraint = KnownPixels(chains.mask, chains.known)
    constrain = None
    if constraint is not None:
        if not program.constrains:
            raise ValueError(
                f"method {program.name!r} imposes nothing on its way; take a table (ald, dpmpp, "
                "...) or pc, or restore by the score"
            )
        constrain = functools.partial(impose, constraint, chains)
    try:
        result = engine.solve(
            program, chains, guide=guide, constrain=constrain, on_step=monitor.step_done
        )
    except SolverError as error:
        index = int(chains.samples.cpu()[error.row])
        raise SamplingError(f"sample {index} of seed {chains.seed}: {error}") from error
    chains.x = result.x
    monitor.finish()
    return result.x, result.nfe.cpu()


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU's memory did not suffice; cuDNN, TensorRT and the driver only say so."""
    words = ("out of memory", "outofmemory", "failed to allocate", "unable to find an engine")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error).lower() for w in words)


def make_report(
    engine: Engine, program: Program | Procedure, nfe: Tensor, seconds: float
) -> Report:
    """Report of a call that took so many seconds and evaluations (n,)."""
    mean: int | float = program.nfe or 0
    if program.nfe is None and len(nfe):
        mean = float(nfe.double().mean())
    most = int(nfe.max()) if len(nfe) else program.nfe or 0
    return Report(
        program.name, mean, len(nfe), seconds, engine.name, engine.dtype, engine.batch_size, most
    )


__all__ = [
    "Callback",
    "Job",
    "MicroBatch",
    "Progress",
    "Report",
    "SamplingError",
    "make_report",
    "run",
]  # fmt: skip

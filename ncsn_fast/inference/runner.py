"""Runner of a sampling call: cuts its chains into micro-batches of a fixed size and runs them."""

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
from ncsn_fast.inference.user_functions import UserFunctions
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.samplers.constraints import ConstrainedUpdate, Constraint, KnownPixels, impose
from ncsn_fast.samplers.procedure import Guide, Procedure, SolverError
from ncsn_fast.samplers.program import Chains, Program, initial_state


@dataclasses.dataclass(frozen=True)
class Report:
    """Summary of a call: model, method, network evaluations, images, seconds, engine.

    Attributes:
        nfe: network evaluations per sample; the mean if samples differ.
        nfe_most: the largest of any sample, which determines the work of its micro-batch.
        model: architecture and image shape, such as "ncsnv2 1x16x16".
    """

    method: str
    nfe: int | float
    n: int
    seconds: float
    engine: str
    dtype: str
    batch_size: int
    nfe_most: int
    model: str


@dataclasses.dataclass
class Job:
    """Chains of a call; every field has n rows.

    Attributes:
        samples: (n,) int64, the sample index that keys each chain's noise.
        noise_weights, mask, known: as in Chains.   init: initial state, or None for the program's.
        constraint: other known measurements, imposed where the sampler imposes known pixels.
        guide: changes the score.
        labels: classes (n,) int64 of a network that takes them.   guidance: as in Chains.
    """

    samples: Tensor
    noise_weights: Tensor | None = None
    mask: Tensor | None = None
    known: Tensor | None = None
    init: Tensor | None = None
    constraint: Constraint | None = None
    guide: Guide | None = None
    labels: Tensor | None = None
    guidance: float | None = None

    def chains(
        self, rows: Tensor, program: Program | Procedure, seed: int, engine: Engine
    ) -> Chains:
        """Returns the chains of some rows in their initial state, on the engine's device."""

        def take(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[rows].to(engine.device).contiguous()

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
                labels=take(self.labels),
                guidance=self.guidance,
            )


class MicroBatch(NamedTuple):
    """Result of a micro-batch: sample indices (B,), final states on the CPU, evaluations (B,)."""

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
    """Runs a job and yields its results, micro-batch by micro-batch.

    The last micro-batch is padded rather than shrunk, so that results do not depend on how the work
    was split. Exceptions of the caller's functions (callback, guide, classifier, operator) come
    through as they are.

    Args:
        shrink: called when the engine runs out of GPU memory; returns an engine for smaller
            micro-batches, with which the run continues, or raises. The micro-batch begins again,
            so its levels are reported to the callback a second time.
    """
    n, first = len(job.samples), 0
    unit = "level" if isinstance(program, Program) else "%"
    with tqdm(unit=unit, disable=not progress, dynamic_ncols=True) as bar:
        while first < n:
            size, units = engine.batch_size, _units(engine, program)
            bar.total = bar.n + -(-(n - first) // size) * units
            count, done = min(size, n - first), bar.n
            chains = monitor = None
            user = UserFunctions()
            rows = torch.arange(first, first + size).clamp(max=n - 1)
            try:
                chains = job.chains(rows, program, seed, engine)
                chains.count = count
                monitor = Monitor(program, chains, count, bar, callback, user)
                x, nfe = _run(engine, program, job, rows, chains, monitor, user)
                drawn = MicroBatch(job.samples[first : first + count], x[:count].cpu(), nfe[:count])
                monitor.check()
            except StopIteration as error:  # a generator would hide which function it came from
                raise SamplingError(
                    "the callback, guide or classifier raised StopIteration, which cannot end a "
                    "call; raise another exception"
                ) from error
            except RuntimeError as error:
                full = user.out_of_memory(error)
                chains = monitor = user.raised = None  # free their memory
                if shrink is None or not full:
                    raise
                engine = shrink(engine, error.with_traceback(None))
                bar.n = done
                continue
            yield drawn
            first += count


def _units(engine: Engine, program: Program | Procedure) -> int:
    """Returns the units of the progress bar for one micro-batch."""
    return len(engine.chunks(program)) if isinstance(program, Program) else UNITS


def _run(
    engine: Engine,
    program: Program | Procedure,
    job: Job,
    rows: Tensor,
    chains: Chains,
    monitor: Monitor,
    user: UserFunctions,
) -> tuple[Tensor, Tensor]:
    """Runs a micro-batch; returns its final states, and evaluations (B,) on the CPU."""
    guide = constraint = None
    if job.guide is not None:
        guide = user.guide(job.guide, rows, engine.device)
    if job.constraint is not None:
        constraint = user.constraint(job.constraint, rows, engine.device)
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


def make_report(
    engine: Engine, program: Program | Procedure, nfe: Tensor, seconds: float
) -> Report:
    """Makes the Report of a call that took so many seconds and evaluations (n,)."""
    mean: int | float = program.nfe or 0
    if program.nfe is None and len(nfe):
        mean = float(nfe.double().mean())
    most = int(nfe.max()) if len(nfe) else program.nfe or 0
    return Report(
        method=program.name,
        nfe=mean,
        n=len(nfe),
        seconds=seconds,
        engine=engine.name,
        dtype=engine.dtype,
        batch_size=engine.batch_size,
        nfe_most=most,
        model=name_of(engine.model),
    )


def name_of(model: ScoreModel) -> str:
    """Returns architecture and image shape of a model, such as "ncsnv2 1x16x16"."""
    return f"{model.config.arch} {'x'.join(map(str, model.image_shape))}"


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

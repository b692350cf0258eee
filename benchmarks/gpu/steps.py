"""One sampling step, network and Langevin update, from the published code to this package.

A lap is the steps of one noise level of the CIFAR-10 network, followed by a synchronisation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import workloads
from published import Plain, Published, step
from race import Absent, Entrant, relative_error
from torch import Tensor

from gpu import timing
from gpu.section import Section
from ncsn_fast import EngineUnavailable, ScoreModel, engines, ops
from ncsn_fast.engines.base import Engine
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.inference.cost import network_flop
from ncsn_fast.samplers.langevin import annealed_langevin
from ncsn_fast.samplers.program import Chains, InjectedNoise, Program, run

STEPS = 5  # per noise level
WORKLOAD = workloads.WORKLOADS["cifar10-b1"]
EPSILON = 6.2e-6  # the published step size for CIFAR-10


@dataclasses.dataclass(frozen=True)
class Task:
    """Steps `rows` of a program from state x, and their expected results.

    Attributes:
        program: in terms of sigma * score, the output of NCSNv2 networks.
        f: the network's output for x in eager float32.   after: the state after the rows, with
            the noise of seed 0.
    """

    model: ScoreModel
    x: Tensor
    program: Program
    rows: range
    f: Tensor
    after: Tensor

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def samples(self) -> Tensor:
        return torch.arange(len(self.x), device=self.device)


def make_task(batch: int, device: torch.device, *, small: bool) -> Task:
    """Returns the task of the CIFAR-10 network in the middle of its noise levels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ScoreModel(workloads.model_config(WORKLOAD, small=small))
    model.eval().requires_grad_(False)
    steps = 2 if small else STEPS
    program = annealed_langevin(model.sigmas.double().numpy(), EPSILON, steps)
    first = steps * (len(model.sigmas) // 2)
    rows, generator = range(first, first + steps), torch.Generator().manual_seed(1)
    x = torch.rand(batch, *model.image_shape, generator=generator).to(device)
    eager = EagerEngine(model, device=device, dtype="fp32", batch_size=batch)

    def draw(stream: Any, k: int) -> Tensor:
        return ops.normal(0, torch.arange(batch), stream, k, model.image_shape).to(device)

    chains = Chains(x.clone(), 0, torch.arange(batch, device=device))
    # Too few calls to justify a search for the fastest algorithm.
    with eager.context(), _cudnn(benchmark=False):
        f = eager.network(x, None)
        after = run(
            program, lambda y, k: eager.network(y, None), chains, update=InjectedNoise(draw),
            start=rows.start, stop=rows.stop,
        )  # fmt: skip
    return Task(model, x, program, rows, f, after)


# Providers ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _cudnn(**settings: bool) -> Iterator[None]:
    """Changes cuDNN's `benchmark` and `allow_tf32` (PyTorch's default: on) in the `with` block."""
    before = {name: getattr(torch.backends.cudnn, name) for name in settings}
    for name, value in settings.items():
        setattr(torch.backends.cudnn, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(torch.backends.cudnn, name, value)


def published(task: Task, *, tf32: bool) -> Entrant:
    """Returns the released loop: eager, float32, NCHW, with the norms that it could print."""
    network = Published(task.model).eval().to(task.device)

    def steps() -> None:
        x = task.x
        with torch.no_grad(), _cudnn(allow_tf32=tf32):
            for k in task.rows:
                x = step(network, task.program, x, k)

    def error() -> float:
        with torch.no_grad(), _cudnn(allow_tf32=tf32):
            return relative_error(network(task.x), task.f)

    return _entrant(task, steps, error, 1e-2 if tf32 else 1e-3)


def _bf16(network: Plain, device: torch.device) -> Plain:
    network = network.eval().to(device)
    return network.to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _langevin(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Returns x + b f + c z in plain PyTorch around a bfloat16 network."""

    def one(x: Tensor, b: Tensor, c: Tensor) -> Tensor:
        f = network(x.to(torch.bfloat16, memory_format=torch.channels_last))
        return x + b * f.float() + c * torch.randn_like(x)

    return one


def _user_loop(
    task: Task, network: Plain, one: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Entrant:
    # Separate tensors, since torch.compile would copy views into a table at every call.
    b, c = (
        {k: torch.tensor(column[k], dtype=torch.float32, device=task.device) for k in task.rows}
        for column in (task.program.b, task.program.c)
    )
    state = task.x.clone()

    def steps() -> None:
        with torch.inference_mode():
            state.copy_(task.x)
            for k in task.rows:
                state.copy_(one(state, b[k], c[k]))

    def error() -> float:
        silent = torch.zeros((), device=task.device)
        with torch.inference_mode():  # through `one`, so that the compiled function is checked
            f = one(task.x, silent + 1, silent) - task.x
        return relative_error(f, task.f)

    return _entrant(task, steps, error, 3e-2, holds=network)


def eager_bf16(task: Task) -> Entrant:
    """Returns the usual first changes to the released code: bfloat16, channels-last, no norms."""
    network = _bf16(Published(task.model), task.device)
    return _user_loop(task, network, _langevin(network))


def inductor_bf16(task: Task, *, mode: str) -> Entrant:
    """Returns the whole step in torch.compile, channels-last."""
    import torch._dynamo

    torch._dynamo.reset()
    network = _bf16(Plain(task.model), task.device)
    one = torch.compile(_langevin(network), mode=mode, dynamic=False, fullgraph=True)
    entrant = _user_loop(task, network, one)
    try:
        entrant.run()  # compiles
        entrant.run()
    except Exception as error:
        raise Absent(f"torch.compile fails here: {str(error).strip().splitlines()[0]}") from error
    return entrant


def ours(task: Task, **options: str) -> Entrant:
    """Returns the sampling loop of this package's engine."""
    try:
        from ncsn_fast.engines.cuda.engine import CudaEngine
    except ImportError as error:
        raise Absent(f"ncsn_fast.engines.cuda.engine cannot be imported: {error}") from error
    problem = CudaEngine.unavailable() if task.device.type == "cuda" else None
    if problem is not None:
        raise Absent(problem)
    engine = CudaEngine(
        task.model, device=task.device, dtype="bf16", batch_size=len(task.x), **options
    )
    return _engine_loop(task, engine)


def runtime(task: Task, *, engine: str, **options: str) -> Entrant:
    """Returns a third-party runtime's engine in float16, followed by this package's update."""
    try:
        kind, device, _ = engines.pick(engine, task.device, task.model)
        built = kind(task.model, device=device, dtype="fp16", batch_size=len(task.x), **options)
    except (EngineUnavailable, ValueError) as error:
        raise Absent(str(error)) from error
    return _engine_loop(task, built)


def _engine_loop(task: Task, engine: Engine) -> Entrant:
    """Returns an engine's steps; verifies its network, and the state after noisy rows.

    Laps continue from level to level, as in sampling; restarting would reload the program.
    """
    chains = Chains(task.x.clone(), 0, task.samples)
    with engine.context():
        run_rows = engine.stepper(task.program, chains, None, None)
    size, next_row = len(task.rows), task.rows.start

    def steps() -> None:
        nonlocal next_row
        with engine.context():
            run_rows(next_row, next_row + size)
        next_row += size
        if next_row + size > task.program.nfe:
            next_row = task.rows.start

    def error() -> float:
        with engine.context():
            network = relative_error(engine.network(task.x, None), task.f)
        steps()
        moved = relative_error(chains.x - task.x, task.after - task.x)
        return max(network, moved) if network == network and moved == moved else torch.nan

    return _entrant(task, steps, error, 3e-2)


def _entrant(
    task: Task,
    steps: Callable[[], None],
    error: Callable[[], float],
    bound: float,
    holds: object = None,
) -> Entrant:
    def lap(_: object = holds) -> None:
        steps()
        timing.synchronize(task.device)

    return Entrant(lap, error, bound, {"calls": len(task.rows)})


PROVIDERS: dict[str, Callable[[Task], Entrant]] = {
    "published-fp32": functools.partial(published, tf32=False),
    "published-tf32": functools.partial(published, tf32=True),
    "eager-bf16": eager_bf16,
    "inductor-bf16": functools.partial(inductor_bf16, mode="max-autotune-no-cudagraphs"),
    "inductor-graphs-bf16": functools.partial(inductor_bf16, mode="max-autotune"),
    **{
        f"ours-{kernels}-{graph}": functools.partial(ours, kernels=kernels, graph=graph)
        for kernels in ("triton", "cuda")
        for graph in ("none", "step", "level")
    },
    # Lets cuDNN time its algorithms, as for all providers above.
    "ours-triton-tuned": functools.partial(ours, kernels="triton", graph="level", tune="on"),
    "ort-fp16": functools.partial(runtime, engine="ort"),
    "ort-fp16-graph": functools.partial(runtime, engine="ort", graph="on"),
    "trt-fp16": functools.partial(runtime, engine="trt"),
}
PUBLISHED = ["published-fp32", "published-tf32", "eager-bf16"]
OURS = [name for name in PROVIDERS if name.startswith("ours")]
LEVEL = ["ours-triton-level", "ours-cuda-level"]
RUNTIMES = ["ort-fp16", "ort-fp16-graph", "trt-fp16"]


def measure(
    section: Section, *, batch: int, names: list[str], seconds: float, against: str = ""
) -> None:
    """Races the named providers at a batch size; `against` labels races that compare others."""
    title = f"one sampling step, B = {batch}{', ' if against else ''}{against}"
    section.plan([(title, names)])
    if section.small:
        batch = min(batch, 2)
    task = make_task(batch, section.device, small=section.small)
    builders = {name: functools.partial(_build, section, task, name) for name in names}
    section.race(
        title, builders, seconds=seconds, batch=batch, flop=batch * network_flop(task.model),
        steps=len(task.rows), nfe=task.program.nfe,
    )  # fmt: skip


def _build(section: Section, task: Task, name: str) -> Entrant:
    if section.small and name.startswith("inductor"):
        raise Absent("a rehearsal compiles nothing")
    first = (section.record["section"], name) == ("step-b1", "ours-triton-level")
    if section.small and name.startswith("ours-triton") and not first:
        raise Absent("a rehearsal interprets one engine of Triton's, at B = 1")
    return PROVIDERS[name](task)

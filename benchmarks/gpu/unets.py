"""Steps of sampling with a network that a user brings (user_unet.py), by Euler steps, as DDIM does.

A lap is a whole run of few steps from one state, followed by a synchronisation; a step is one
evaluation of the network and one update.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import user_unet
from race import Absent, Entrant, relative_error
from torch import Tensor, nn

from gpu import timing
from gpu.section import Section
from ncsn_fast import ScoreModel
from ncsn_fast.engines.base import Engine
from ncsn_fast.engines.cuda.engine import CudaEngine
from ncsn_fast.engines.eager import EagerEngine
from ncsn_fast.inference.cost import network_flop
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.program import Chains, Program

STEPS = 10


@dataclasses.dataclass(frozen=True)
class Task:
    """A run from state x, and its result in eager float32."""

    x: Tensor
    program: Program
    result: Tensor
    small: bool

    def chains(self) -> Chains:
        return Chains(self.x.clone(), 0, torch.arange(len(self.x), device=self.x.device))


class Converted(nn.Module):
    """A network in another type, channels-last, with float32 at its ends, as users write it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        kind = next(self.network.parameters()).dtype
        x = x.to(kind, memory_format=torch.channels_last)
        f: Tensor = self.network(x, t).sample
        return f.float()


def measure(section: Section, *, batch: int, seconds: float) -> None:
    """Races the providers at a batch size."""
    title = f"one sampling step, DDPM U-Net of diffusers, B = {batch}"
    section.plan([(title, PROVIDERS)])
    batch = min(batch, 2) if section.small else batch

    @functools.cache
    def task() -> Task:
        return _task(section, batch)

    builders = {name: functools.partial(_build, section, task, name) for name in PROVIDERS}
    try:
        flop = batch * network_flop(user_unet.model(section.small))
    except Absent:
        flop = 0  # every provider says so
    section.race(title, builders, seconds=seconds, batch=batch, flop=flop, steps=STEPS, nfe=STEPS)


def _task(section: Section, batch: int) -> Task:
    model = user_unet.model(section.small)
    program = methods.build("euler", model, STEPS, {})
    assert program.nfe == STEPS
    x = torch.randn(batch, *model.image_shape, generator=torch.Generator().manual_seed(1))
    x = (x * float(program.sigma[0])).to(section.device)
    task = Task(x, program, x, section.small)
    result = _eager(task, model).run(program, task.chains())
    return dataclasses.replace(task, result=result)


def _eager(task: Task, model: ScoreModel) -> EagerEngine:
    return EagerEngine(model, device=task.x.device, dtype="fp32", batch_size=len(task.x))


def _in_bfloat16(task: Task) -> Engine:
    network = Converted(user_unet.network(task.small))
    engine = _eager(task, user_unet.wrapped(network, task.small))
    for module in engine.replica.modules():
        if isinstance(module, Converted):
            module.network.bfloat16()  # models are float32 until an engine has a copy
    return engine


def _ours(task: Task, *, kernels: str) -> Engine:
    problem = CudaEngine.unavailable() if task.x.is_cuda else None
    if problem is not None:
        raise Absent(problem)
    model = user_unet.model(task.small)
    return CudaEngine(
        model, device=task.x.device, dtype="bf16", batch_size=len(task.x), kernels=kernels
    )


PROVIDERS: dict[str, tuple[Callable[[Task], Engine], float]] = {
    "published-fp32": (lambda task: _eager(task, user_unet.model(task.small)), 1e-5),
    "eager-bf16": (_in_bfloat16, 5e-2),
    "ours-triton-level": (functools.partial(_ours, kernels="triton"), 5e-2),
    "ours-cuda-level": (functools.partial(_ours, kernels="cuda"), 5e-2),
}


def _build(section: Section, task: Callable[[], Task], name: str) -> Entrant:
    if section.small and name.startswith("ours-triton"):
        raise Absent("a rehearsal interprets one engine of Triton's, at B = 1")
    make, bound = PROVIDERS[name]
    given = task()
    engine, chains = make(given), given.chains()

    def run() -> Tensor:
        chains.x.copy_(given.x)
        engine.run(given.program, chains)
        timing.synchronize(given.x.device)
        return chains.x

    return Entrant(run, lambda: relative_error(run(), given.result), bound, {"calls": STEPS})

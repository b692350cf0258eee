"""Whole samplings of the shipped model, end to end: images per second."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import published
import pytest
import torch
from race import Entrant, relative_error
from torch import Tensor

import ncsn_fast
from ncsn_fast import Sampler, ScoreModel, noise, ops
from ncsn_fast.noise import Stream
from ncsn_fast.plan import network_flop
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.program import Program, initial_state

IMAGES = 8
# Of a small run: few levels. The step size is given, because to derive one takes seconds.
SMALL: dict[str, dict[str, Any]] = {
    "ald": {"steps": 2, "n_steps_each": 1, "epsilon": 1e-5},
    "cas": {"steps": 2},
}
ENGINES = {"eager": ("eager", "fp32"), "ours-fp32": ("cpu", "fp32"), "ours-bf16": ("cpu", "bf16")}
BOUNDS = {"published": 1e-3, "eager": 0.0, "ours-fp32": 1e-3, "ours-bf16": 3e-2}


@dataclasses.dataclass(frozen=True)
class Task:
    """So many samples of the shipped model by a method, of seed 0."""

    model: ScoreModel
    method: str
    options: dict[str, Any]

    @property
    def program(self) -> Program:
        options = dict(self.options)
        return methods.build(self.method, self.model, options.pop("steps", None), options)

    def by(self, provider: str) -> Callable[[], Tensor]:
        """Drawing them by one of ENGINES."""
        engine, dtype = ENGINES[provider]
        sampler = Sampler(self.model, engine=engine, dtype=dtype, batch_size=IMAGES)
        return functools.partial(
            sampler.sample, IMAGES, method=self.method, progress=False, **self.options
        )


@pytest.mark.parametrize("provider", BOUNDS)
@pytest.mark.parametrize("method", ["ald", "cas"])
def bench_digits(race: Callable[..., None], method: str, provider: str) -> None:
    """From nothing to images; the published loop draws its noise by torch.randn."""

    def builders(heat: Any) -> dict[str, Callable[[], Entrant]]:
        options = SMALL[method] if heat.small else {}
        task = Task(ncsn_fast.load("digits"), method, options)
        expected = task.by("eager")()
        return {name: functools.partial(_enter, name, task, expected) for name in heat.names}

    race(builders, f"digits, {method}, {IMAGES} images", lead_in=0)


def _enter(name: str, task: Task, expected: Tensor) -> Entrant:
    nfe = task.program.nfe
    info = {
        "dtype": "bf16" if name.endswith("bf16") else "fp32",
        "batch": IMAGES,
        "images": IMAGES,
        "method": task.method,
        "nfe": nfe,
        "flop": IMAGES * nfe * network_flop(task.model),
    }
    run, judged = _published(task) if name == "published" else (task.by(name),) * 2
    return Entrant(run, lambda: relative_error(judged(), expected), BOUNDS[name], info)


def _published(task: Task) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The released loop with its own noise, and with ours: the samples to compare."""
    network, program = published.Published(task.model).eval(), task.program
    shape = task.model.image_shape
    samples = noise.sample_indices(0, IMAGES)

    def run() -> Tensor:
        return published.sample(network, program, torch.rand(IMAGES, *shape))

    def with_our_noise() -> Tensor:
        start = initial_state(program, 0, samples, shape)
        return published.sample(
            network, program, start,
            lambda x, k: ops.normal(0, samples, Stream.SAMPLER, k, shape),
        )  # fmt: skip

    return run, with_our_noise

"""Benchmarks of whole samplings in images per second: same method, and equal quality."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import published
import pytest
import torch
from race import Entrant, relative_error
from torch import Tensor
from workloads import WORKLOADS, make

import ncsn_fast
from ncsn_fast import Sampler, ScoreModel, ops
from ncsn_fast.inference.cost import network_flop
from ncsn_fast.ops import noise
from ncsn_fast.ops.noise import Stream
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.program import Program, initial_state

IMAGES = 8
# Options of a small run: few levels, and a given step size, since deriving one takes seconds.
SMALL: dict[str, dict[str, Any]] = {
    "ald": {"steps": 2, "n_steps_each": 1, "epsilon": 1e-5},
    "cas": {"steps": 2},
    "fast": {"steps": 6},
    "tuned": {"steps": 6},
}
ENGINES = {"eager": ("eager", "fp32"), "ours-fp32": ("cpu", "fp32"), "ours-bf16": ("cpu", "bf16")}
BOUNDS = {"published": 1e-3, "eager": 0.0, "ours-fp32": 1e-3, "ours-bf16": 3e-2}


@dataclasses.dataclass(frozen=True)
class Task:
    """Sampling task: samples 0 .. IMAGES-1 of seed 0, of a model by a method.

    Attributes:
        whole: the method's options.
        part: further options that keep only some rows of the whole; these are run, and the others
            are assumed to cost the same.
        checked: number of samples that are compared with the reference.
    """

    model: ScoreModel
    method: str
    whole: dict[str, Any]
    part: dict[str, Any] = dataclasses.field(default_factory=dict)
    checked: int = IMAGES

    @property
    def program(self) -> Program:
        """Returns the program that is run."""
        return self._build(self.whole | self.part)

    @property
    def nfe(self) -> int:
        """Returns the number of evaluations of the whole."""
        return self._build(self.whole).nfe

    def _build(self, options: dict[str, Any]) -> Program:
        others = {name: value for name, value in options.items() if name != "steps"}
        program = methods.build(self.method, self.model, options.get("steps"), others)
        assert isinstance(program, Program)
        return program

    def sampler(self, provider: str, batch: int = IMAGES) -> Sampler:
        """Returns a sampler with an engine of ENGINES."""
        engine, dtype = ENGINES[provider]
        return Sampler(self.model, engine=engine, dtype=dtype, batch_size=batch)

    def draw(self, sampler: Sampler, n: int = IMAGES, **options: Any) -> Tensor:
        options |= self.whole | self.part
        return sampler.sample(n, method=self.method, progress=False, **options)

    def state(self, sampler: Sampler) -> Tensor:
        """Returns the final state of the checked chains, before clipping to images."""
        states: list[Tensor] = []
        self.draw(sampler, self.checked, callback=lambda progress: states.append(progress.x))
        return states[-1]

    def reference(self) -> Tensor:
        return self.state(self.sampler("eager", self.checked))


@pytest.mark.parametrize("provider", BOUNDS)
@pytest.mark.parametrize("method", ["ald", "cas"])
def bench_digits(race: Callable[..., None], method: str, provider: str) -> None:
    """Times sampling from scratch; the published loop draws its noise by torch.randn."""

    def builders(settings: Any) -> dict[str, Callable[[], Entrant]]:
        task = Task(ncsn_fast.load("digits"), method, SMALL[method] if settings.small else {})
        info = {"images": IMAGES}
        expected = task.reference()
        return {
            name: functools.partial(_enter, name, task, expected, info) for name in settings.names
        }

    race(builders, f"digits, {method}, {IMAGES} images", lead_in=0)


@dataclasses.dataclass(frozen=True)
class Work:
    """Model, and for methods whose whole run takes too long, the options that select a part."""

    title: str
    model: Callable[[bool], ScoreModel]
    parts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def task(self, method: str, *, small: bool) -> Task:
        """Returns the task of a method, or of `fast` by a tuned table for "tuned".

        A model without a table runs as many rows as that of the digits has: rows cost the same.
        """
        model, whole = self.model(small), SMALL[method] if small else {}
        if method != "tuned":
            model.tuned = None
        elif model.tuned is None and not small:
            of_digits = ncsn_fast.load("digits").tuned
            assert of_digits is not None
            whole = {"steps": of_digits.steps}
        method = "fast" if method == "tuned" else method
        return Task(model, method, whole, self.parts.get(method, {}), checked=2)


# The published loop takes 15 minutes and more for 8 images of CIFAR-10, so only its first noise
# level is timed; every level costs the same.
WORKS = {
    "digits": Work("digits", lambda small: ncsn_fast.load("digits")),
    "cifar10": Work(
        "CIFAR-10",
        lambda small: make(WORKLOADS["cifar10-b8"], small=small)[0],
        {"ald": {"steps": 1, "denoise": False}},
    ),
}
# Engine and method of each provider. quality.py measures that `fast`, also by the table that was
# tuned for the digits, is as good as `ald`.
EQUALS = {
    "published": ("published", "ald"),
    "ours-ald-fp32": ("ours-fp32", "ald"),
    "ours-ald-bf16": ("ours-bf16", "ald"),
    "ours-fast-fp32": ("ours-fp32", "fast"),
    "ours-fast-bf16": ("ours-bf16", "fast"),
    "ours-tuned-bf16": ("ours-bf16", "tuned"),
}
RATE = "images/s = batch / (median x nfe / evaluations): of nfe evaluations, so many were timed"


@pytest.mark.parametrize("provider", EQUALS)
@pytest.mark.parametrize("work", WORKS)
def bench_equal_quality(race: Callable[..., None], work: str, provider: str) -> None:
    """Times the published code against `ald` and `fast` of this package."""

    def builders(settings: Any) -> dict[str, Callable[[], Entrant]]:
        wanted = {name: EQUALS[name] for name in settings.names}
        tasks = {m: WORKS[work].task(m, small=settings.small) for _, m in wanted.values()}
        expected = {method: task.reference() for method, task in tasks.items()}
        return {
            name: functools.partial(_enter, by, tasks[m], expected[m], {"rate": RATE})
            for name, (by, m) in wanted.items()
        }

    race(builders, f"{WORKS[work].title}, ald against fast, {IMAGES} images")


def _enter(name: str, task: Task, expected: Tensor, more: dict[str, Any]) -> Entrant:
    evaluations = task.program.nfe
    info = {
        "dtype": "bf16" if name.endswith("bf16") else "fp32",
        "batch": IMAGES,
        "method": task.method,
        "nfe": task.nfe,
        "evaluations": evaluations,
        "flop": IMAGES * evaluations * network_flop(task.model),
        **more,
    }
    run, checked = _published(task) if name == "published" else _ours(name, task)
    return Entrant(run, lambda: relative_error(checked(), expected), BOUNDS[name], info)


Runs = tuple[Callable[[], Tensor], Callable[[], Tensor]]  # the timed call and the checked call


def _ours(name: str, task: Task) -> Runs:
    sampler = task.sampler(name)
    return functools.partial(task.draw, sampler), functools.partial(task.state, sampler)


def _published(task: Task) -> Runs:
    """Returns the released loop with its own noise, and its steps with this package's noise."""
    network, program = published.Published(task.model).eval(), task.program
    _, first = np.unique(program.level, return_index=True)
    network.sigmas = torch.from_numpy(program.sigma[first]).float()  # noise levels of this run
    shape = task.model.image_shape
    samples = noise.sample_indices(0, task.checked)

    def run() -> Tensor:
        return published.sample(network, program, torch.rand(IMAGES, *shape))

    def draw(x: Tensor, k: int) -> Tensor:
        return ops.normal(0, samples, Stream.SAMPLER, k, shape)

    def state() -> Tensor:
        x = initial_state(program, 0, samples, shape)
        with torch.no_grad():
            for k in range(program.nfe):
                x = published.step(network, program, x, k, draw)
        return x

    return run, state

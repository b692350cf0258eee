"""Benchmarks of the published U-Nets of score_sde and EDM on CIFAR-10, on the CPU.

One forward, and EDM's sampling in 18 steps of Heun's method. Weights are random.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conditional_providers import EAGER, OTHERS, Forward, enter
from published_unet import edm_sample, model
from race import Entrant, relative_error
from torch import Tensor

from ncsn_fast import Sampler, ScoreModel
from ncsn_fast.inference.cost import network_flop
from ncsn_fast.ops import noise
from ncsn_fast.samplers import methods
from ncsn_fast.samplers.program import Program, initial_state

NETWORKS = {
    "ncsnpp": ("NCSN++", "cifar10_ncsnpp_continuous"),
    "edm-cond-vp": ("EDM cond-vp", "edm-cifar10-32x32-cond-vp"),
    "edm-uncond-ve": ("EDM uncond-ve", "edm-cifar10-32x32-uncond-ve"),
}
BATCHES = {"b1": 1, "b8": 8}
PROVIDERS = {"published": EAGER, **OTHERS}
IMAGES = 8
STEPS, SMALL_STEPS = 18, 3
EDM: dict[str, Any] = {"method": "heun", "schedule": "karras"}
# Allowed relative errors of the last state.
SAMPLERS = {"published": 1e-3, "ours-fp32": 1e-3, "ours-bf16": 3e-2}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("network", NETWORKS)
def bench_forward(race: Callable[..., None], network: str, batch: str, provider: str) -> None:
    """Times F(u, c) of inputs given as float32 NCHW."""
    title, name = NETWORKS[network]

    def builders(settings: Any) -> dict[str, Callable[[], Entrant]]:
        def build(provider: str) -> Entrant:
            of = Forward.of(model(name, settings.small), BATCHES[batch])
            return enter(PROVIDERS[provider], of, f"{network}-{batch}", small=settings.small)

        return {provider: functools.partial(build, provider) for provider in settings.names}

    race(builders, f"{title} 32x32, B = {BATCHES[batch]}")


@pytest.mark.parametrize("provider", SAMPLERS)
@pytest.mark.parametrize("network", ["edm-cond-vp"])
def bench_heun(race: Callable[..., None], network: str, provider: str) -> None:
    """Times sampling from noise to images, 35 evaluations."""
    title, name = NETWORKS[network]

    def builders(settings: Any) -> dict[str, Callable[[], Entrant]]:
        steps = SMALL_STEPS if settings.small else STEPS
        task = functools.cache(lambda: _Sampling(model(name, settings.small), steps))
        return {
            provider: functools.partial(lambda provider: task().enter(provider), provider)
            for provider in settings.names
        }

    race(builders, f"{title}, heun in {STEPS} steps, {IMAGES} images")


class _Sampling:
    """Samples 0 .. IMAGES-1 of seed 0; eager float32 is the reference."""

    def __init__(self, of: ScoreModel, steps: int) -> None:
        self.model, self.steps = of, steps
        self.labels = torch.arange(IMAGES) % of.n_classes if of.n_classes else None
        program = methods.build("heun", of, steps, {"schedule": "karras"})
        assert isinstance(program, Program)
        self.program = program
        self.expected = self.state(Sampler(of, engine="eager", batch_size=IMAGES))

    def draw(self, sampler: Sampler, **options: Any) -> Tensor:
        return sampler.sample(
            IMAGES, **EDM, steps=self.steps, labels=self.labels, progress=False, **options
        )

    def state(self, sampler: Sampler) -> Tensor:
        """Returns the last state, before clipping to images."""
        states: list[Tensor] = []
        self.draw(sampler, callback=lambda progress: states.append(progress.x))
        return states[-1]

    def published(self) -> Tensor:
        """Returns the last state of the published loop, from the same initial state."""
        samples = noise.sample_indices(0, IMAGES)
        x = initial_state(self.program, 0, samples, self.model.image_shape)
        return (edm_sample(self.model, 2 * x - 1, self.steps, self.labels) + 1) / 2

    def enter(self, provider: str) -> Entrant:
        dtype = "bf16" if provider.endswith("bf16") else "fp32"
        nfe = self.program.nfe
        info = {
            "images": IMAGES, "dtype": dtype, "batch": IMAGES, "method": "heun", "nfe": nfe,
            "evaluations": nfe, "flop": IMAGES * nfe * network_flop(self.model),
        }  # fmt: skip
        run = checked = self.published
        if provider != "published":
            sampler = Sampler(self.model, engine="cpu", dtype=dtype, batch_size=IMAGES)
            run = functools.partial(self.draw, sampler)
            checked = functools.partial(self.state, sampler)
        return Entrant(
            run, lambda: relative_error(checked(), self.expected), SAMPLERS[provider], info
        )

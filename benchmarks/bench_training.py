"""Benchmarks of one training step: loss, gradient and Adam update."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import published
import pytest
import torch
import workloads
from race import Entrant, relative_error
from torch import Tensor

from ncsn_fast import ops
from ncsn_fast.diffusion.objectives import denoising_score_matching, random_levels
from ncsn_fast.inference.cost import network_flop

BATCH = 4
PROVIDERS = ("published", "reference", "kernel")


class Step:
    """Model in training and one batch; `backend` is an argument of ops.backend."""

    def __init__(self, model: torch.nn.Module, x: Tensor, *, sigmas: Tensor, backend: str) -> None:
        self.model, self.x, self.sigmas, self.backend = model.train(), x, sigmas, backend
        self.model.requires_grad_(True)
        generator = torch.Generator().manual_seed(3)
        self.level = random_levels(len(x), len(sigmas), generator)
        self.noise = torch.randn(x.shape, generator=generator)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def backward(self) -> None:
        """Computes the gradient of denoising score matching in float32."""
        score_at: Any = self.model.score_at
        with ops.backend(self.backend):
            losses = denoising_score_matching(score_at, self.x, self.sigmas, self.level, self.noise)
            self.optimizer.zero_grad(set_to_none=True)
            losses.mean().backward()

    def gradient(self) -> Tensor:
        """Returns the gradient of all weights as one vector."""
        self.backward()
        gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        return torch.cat(gradients)

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_step(race: Callable[..., None], provider: str) -> None:
    """Times a training step of the CIFAR-10 network, float32: fused ops against plain PyTorch."""

    def builders(settings: Any) -> dict[str, Callable[[], Entrant]]:
        config = workloads.Workload("", "cifar10", BATCH)
        expected = _step("reference", config, settings.small).gradient()
        return {
            name: functools.partial(_enter, name, config, settings.small, expected)
            for name in settings.names
        }

    race(builders, f"training step, CIFAR-10 32x32, B = {BATCH}", lead_in=0)


def _step(name: str, workload: workloads.Workload, small: bool) -> Step:
    model, x = workloads.make(workload, small=small)
    sigmas = model.sigmas
    if name == "published":
        return Step(published.Published(model), x, sigmas=sigmas, backend="reference")
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.contiguous(memory_format=torch.channels_last)
    return Step(model, x, sigmas=sigmas, backend={"kernel": "kernels"}.get(name, name))


def _enter(name: str, workload: workloads.Workload, small: bool, expected: Tensor) -> Entrant:
    step = _step(name, workload, small)
    model, _ = workloads.make(workload, small=small)
    # A backward pass costs two forwards; Adam is not counted.
    info = {"dtype": "fp32", "batch": BATCH, "flop": 3 * BATCH * network_flop(model)}
    return Entrant(step, lambda: relative_error(step.gradient(), expected), 1e-3, info)

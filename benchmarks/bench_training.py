"""Benchmarks of one training step: loss, gradient and Adam update, at 32 images."""

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
from ncsn_fast.diffusion.objectives import denoising_score_matching, levels_of
from ncsn_fast.inference.cost import network_flop
from ncsn_fast.ops.noise import Stream
from ncsn_fast.training.objective import Objective

BATCH = 32
NETWORKS = {
    "mnist": "NCSNv2 28x28",
    "mnist-sde": "tutorial's U-Net 28x28",
    "cifar10": "NCSNv2 CIFAR-10",
}
# Where the gradient comes from, in which type, and the largest error of it.
PROVIDERS = {
    "published": ("fp32", 1e-3),
    "reference": ("fp32", 1e-3),
    "kernel": ("fp32", 1e-3),
    "bf16": ("bf16", 0.1),
}


class Step:
    """Step on one batch.

    Args:
        loss: () -> the losses (B,).
        weights: those that are trained.
        backend: argument of ops.backend.
    """

    def __init__(
        self, loss: Callable[[], Tensor], weights: list[Tensor], *, backend: str, dtype: str
    ) -> None:
        self.loss, self.weights, self.backend, self.dtype = loss, weights, backend, dtype
        self.optimizer = torch.optim.Adam(weights, lr=1e-4, fused=backend == "kernels")

    def backward(self) -> None:
        """Computes the gradient of denoising score matching."""
        low = torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16")
        with ops.backend(self.backend):
            with low:
                losses = self.loss()
            self.optimizer.zero_grad(set_to_none=True)
            losses.mean().backward()

    def gradient(self) -> Tensor:
        """Returns the gradient of all weights as one vector."""
        self.backward()
        return torch.cat([w.grad.flatten() for w in self.weights if w.grad is not None])

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("network", NETWORKS)
def bench_step(race: Callable[..., None], network: str, provider: str) -> None:
    """Times a training step: ours against the published way, plain PyTorch in float32."""

    def builders(settings: Any) -> dict[str, Callable[[], Entrant]]:
        expected = _step("reference", network, settings.small).gradient()
        return {
            name: functools.partial(_enter, name, network, settings.small, expected)
            for name in settings.names
        }

    race(builders, f"training step, {NETWORKS[network]}, B = {BATCH}", lead_in=0)


def _step(name: str, network: str, small: bool) -> Step:
    model, x = workloads.make(workloads.Workload("", network, BATCH), small=small)
    # The tutorial's network has PyTorch's norms, as published, where it is not trained.
    model.train(name != "published").requires_grad_(True)
    if name in ("kernel", "bf16"):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    places = torch.arange(len(x))
    uniform = ops.uniform(3, places, Stream.TRAINING, 1, [1])[:, 0]
    noise = ops.normal(3, places, Stream.TRAINING, 0, x.shape[1:])
    loss: Callable[[], Tensor]
    weights = [p for p in model.parameters() if p.requires_grad]
    if name == "published" and model.clock is None:
        net = published.Published(model)
        weights = list(net.net.parameters())
        level = levels_of(uniform, len(model.sigmas))
        loss = functools.partial(
            denoising_score_matching, net.score_at, x, model.sigmas, level, noise
        )
    else:
        objective = Objective(model, anneal_power=2.0)

        def loss() -> Tensor:
            return objective(x, uniform, noise)[1]

    backend = "kernels" if name in ("kernel", "bf16") else "reference"
    return Step(loss, weights, backend=backend, dtype=PROVIDERS[name][0])


def _enter(name: str, network: str, small: bool, expected: Tensor) -> Entrant:
    step = _step(name, network, small)
    model, _ = workloads.make(workloads.Workload("", network, BATCH), small=small)
    dtype, bound = PROVIDERS[name]
    # A backward pass costs two forwards; Adam is not counted.
    info = {"dtype": dtype, "batch": BATCH, "flop": 3 * BATCH * network_flop(model)}
    return Entrant(step, lambda: relative_error(step.gradient(), expected), bound, info)

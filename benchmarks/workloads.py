"""Workloads of the network benchmarks: models of the published sizes, and a tiny one for tests.

Weights are random from one seed: speed does not depend on them, and every process has the same.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ncsn_fast import ModelConfig, ScoreModel, ops
from ncsn_fast.models.architectures import ARCHITECTURES, Architecture, Refine, Stage
from ncsn_fast.training.configs import CONFIGS


@dataclasses.dataclass(frozen=True)
class Workload:
    """Forward of `batch` images through the network of a published configuration."""

    title: str
    config: str
    batch: int


WORKLOADS = {
    "cifar10-b1": Workload("CIFAR-10 32x32, B = 1", "cifar10", 1),
    "cifar10-b8": Workload("CIFAR-10 32x32, B = 8", "cifar10", 8),
    "cifar10-b32": Workload("CIFAR-10 32x32, B = 32", "cifar10", 32),
    "church-b1": Workload("Deeper 96x96, B = 1", "church", 1),
    "ffhq-b1": Workload("Deepest 256x256, B = 1", "ffhq", 1),
}

# The first workload of a small run has little to compile: torch.compile takes most of a minute for
# the narrowest of the published networks. The others have two stages and the fusion between them.
SMALL = {
    "benchmark-one-stage": Architecture((Stage("res1", 1),), (Refine("refine1", "res1", 1),)),
    "benchmark-two-stages": Architecture(
        (Stage("res1", 1), Stage("res2", 2, down=True)),
        (Refine("refine1", "res2", 2), Refine("refine2", "res1", 1)),
    ),
}


def is_first(workload: Workload) -> bool:
    """Returns whether this is the one workload of a small run that compiles everything."""
    return workload is next(iter(WORKLOADS.values()))


def model_config(workload: Workload, *, small: bool = False) -> ModelConfig:
    """Returns the config of a workload's network, at its own size or tiny."""
    if small:
        ARCHITECTURES.update(SMALL)
        one, two = SMALL
        arch = one if is_first(workload) else two
        return ModelConfig(arch=arch, image_size=(8, 8), ngf=8, n_sigmas=4)
    run = CONFIGS[workload.config]
    return run.model_config(  # a run that derives its levels from data has these for its speed
        sigma_begin=run.sigma_begin or 17.0,
        n_sigmas=run.n_sigmas or 95,
        epsilon=run.epsilon or 1e-5,
    )


def make(workload: Workload, *, small: bool = False) -> tuple[ScoreModel, Tensor]:
    """Returns the model and its input (batch, C, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ScoreModel(model_config(workload, small=small)).eval().requires_grad_(False)
    x = torch.rand(2 if small else workload.batch, *model.image_shape, generator=generator)
    return model, x


def expected_output(model: ScoreModel, x: Tensor) -> Tensor:
    """Computes f(x) in eager float32 with the reference ops."""
    with torch.inference_mode(), ops.backend("reference"):
        return model(x)

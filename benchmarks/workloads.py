"""What the network benchmarks compute: models of the published sizes, and one small enough to test.

Weights are random, from one seed: speed does not depend on them, and every process has the same.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ncsn_fast import ModelConfig, ScoreModel, ops
from ncsn_fast.configs import CONFIGS
from ncsn_fast.models.refinenet import ARCHITECTURES, Architecture, Refine, Stage


@dataclasses.dataclass(frozen=True)
class Workload:
    """One forward of `batch` images through the network of a published configuration."""

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

# Every kind of block once, and little for a compiler to do: the published networks have so many
# convolutions that to compile the narrowest of them takes most of a minute.
SMALL = "benchmark-small"
_SMALL_ARCHITECTURE = Architecture(
    stages=(Stage("res1", 1), Stage("res2", 2, down=True), Stage("res3", 2, True, dilation=2)),
    refines=(Refine("refine1", "res3", 2), Refine("refine2", "res1", 1)),
)


def model_config(workload: Workload, *, small: bool = False) -> ModelConfig:
    """The network of a workload, at its own size or as one small network for all of them."""
    if small:
        ARCHITECTURES.setdefault(SMALL, _SMALL_ARCHITECTURE)
        return ModelConfig(arch=SMALL, image_size=(8, 8), ngf=8, n_sigmas=4)
    run = CONFIGS[workload.config]
    return run.model_config(sigma_begin=run.sigma_begin, n_sigmas=run.n_sigmas, epsilon=run.epsilon)


def make(workload: Workload, *, small: bool = False) -> tuple[ScoreModel, Tensor]:
    """The model, and its input (batch, C, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ScoreModel(model_config(workload, small=small)).eval().requires_grad_(False)
    x = torch.rand(2 if small else workload.batch, *model.image_shape, generator=generator)
    return model, x


def expected_output(model: ScoreModel, x: Tensor) -> Tensor:
    """f(x) in eager float32, by the specification of every op."""
    with torch.inference_mode(), ops.backend("reference"):
        return model(x)

"""Smallest model and shortest training run that still have every part.

The trainer is imported only where it is used: tests on a GPU do without it and its packages.
"""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, Any

import torch

from ncsn_fast import ModelConfig, ScoreModel

if TYPE_CHECKING:
    from ncsn_fast.training.configs import TrainConfig
    from ncsn_fast.training.trainer import Trainer

SETTINGS: dict[str, Any] = {
    "image_size": 8, "ngf": 4, "batch_size": 8, "n_sigmas": 4, "sigma_begin": 5.0, "steps": 4,
    "snapshot_every": 4, "log_every": 2, "grid": 0, "warmup": 5,
}  # fmt: skip

IMAGES = torch.randint(
    256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def arguments(**changes: Any) -> list[str]:
    """Returns SETTINGS as arguments of the trainer's command line."""
    pairs = ((f"--{k.replace('_', '-')}", str(v)) for k, v in {**SETTINGS, **changes}.items())
    return [word for pair in pairs for word in pair]


def train_config(**changes: Any) -> TrainConfig:
    from ncsn_fast.training.configs import TrainConfig

    return TrainConfig(**{**SETTINGS, **changes})


def model(seed: int = 0, **changes: Any) -> ScoreModel:
    """Returns a ScoreModel with random weights, biases and norms."""
    settings: dict[str, Any] = {
        "image_size": (8, 8), "channels": 1, "ngf": 4, "n_sigmas": 4, "sigma_begin": 5.0,
        "epsilon": 5e-5, "n_steps_each": 2,
    }  # fmt: skip
    torch.manual_seed(seed)
    built = ScoreModel(ModelConfig(**{**settings, **changes}))
    with torch.no_grad():
        for weight in built.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return built.eval()


def trainer(**changes: Any) -> Trainer:
    """Returns a run on IMAGES, before its first step."""
    from ncsn_fast import train
    from ncsn_fast.data.datasets import MemoryImages
    from ncsn_fast.training.trainer import Trainer

    config = train_config(**changes)
    return Trainer(config, train.resolve_ladder(config, MemoryImages(IMAGES)), torch.device("cpu"))


def same(a: Any, b: Any) -> bool:
    """Compares nested dicts, lists and tensors, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(itertools.starmap(same, zip(a, b, strict=True)))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def run_trainer(arguments: list[str]) -> None:
    """Runs `python -m ncsn_fast.train`, as the body of a process."""
    from ncsn_fast import train
    from ncsn_fast.cli import command

    sys.exit(command.run(lambda: train.main(arguments)))

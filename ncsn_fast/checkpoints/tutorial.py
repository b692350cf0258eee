"""The score-SDE tutorial: the network of a published state dict, from keys and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ncsn_fast.checkpoints.sampling_settings import with_sampling_settings
from ncsn_fast.checkpoints.torch_file import CheckpointError
from ncsn_fast.diffusion import schedule as ladders
from ncsn_fast.models.architectures import TIME_ARCHS, TIME_STYLE, VERSIONS
from ncsn_fast.models.score import ModelConfig
from ncsn_fast.models.unet import Clock

NAME = "the score-SDE tutorial"
_FREQUENCIES = {"embed.W": "unet_a", "embed.0.W": "unet_b"}  # keys of the tutorial's networks


EXAMPLES = tuple(
    ModelConfig(
        arch=name, image_size=(28, 28), ngf=32, n_sigmas=2, sigma_begin=1.0, **TIME_STYLE,
        sigma_min=VERSIONS[version].sigma_min, sigma_max=VERSIONS[version].sigma_max,
    )
    for name, version in TIME_ARCHS.items()
)  # fmt: skip


def recognises(state: Mapping[Any, Any], prefix: str = "") -> bool:
    """Tells whether keys, after a prefix, are those of the tutorial's Fourier features."""
    return any(prefix + key in state for key in _FREQUENCIES)


def infer_config(state: dict[str, Tensor], overrides: dict[str, Any], path: Path) -> ModelConfig:
    """ModelConfig of one of the tutorial's networks, whose sigma(t) is the published one."""
    first = state.get("conv1.weight")
    if first is None or first.ndim != 4:
        raise CheckpointError(f"{path} is not a checkpoint of the tutorial: it lacks conv1.weight")
    arch = next(name for key, name in _FREQUENCIES.items() if key in state)
    ngf, channels = first.shape[:2]
    version = VERSIONS[TIME_ARCHS[arch]]
    found: dict[str, Any] = {
        "arch": arch, "channels": channels, "ngf": ngf, **TIME_STYLE, "sigma_end": 0.01,
        "sigma_min": version.sigma_min, "sigma_max": version.sigma_max, **overrides,
    }  # fmt: skip
    try:
        clock = Clock(TIME_ARCHS[arch], found["sigma_min"], found["sigma_max"])
        found.setdefault("sigma_begin", float(clock.std(1.0)))
        ends = (found["sigma_begin"], found["sigma_end"])
        found.setdefault("n_sigmas", ladders.n_levels(*ends, channels * 28**2))
        return ModelConfig.from_dict(with_sampling_settings(found))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error

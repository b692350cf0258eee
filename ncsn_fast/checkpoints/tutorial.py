"""The score-SDE tutorials: the network of a published state dict, from keys and shapes."""

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

NAME = "the score-SDE tutorials"
_OTHER = "time_embed."  # later notebooks' name of the time's embedding
_EMBED = "embed."
_FREQUENCIES = ("embed.W", "embed.0.W", "time_embed.0.W")


_EXAMPLES = {
    name: ModelConfig(
        arch=name, image_size=(28, 28), ngf=32, n_sigmas=2, sigma_begin=1.0, **TIME_STYLE,
        sigma_min=VERSIONS[version].sigma_min, sigma_max=VERSIONS[version].sigma_max,
    )
    for name, version in TIME_ARCHS.items()
}  # fmt: skip


def examples() -> Mapping[str, ModelConfig]:
    """Networks of this family by name, for messages about foreign files."""
    return _EXAMPLES


def recognises(state: Mapping[Any, Any], prefix: str = "") -> bool:
    """Tells whether keys, after a prefix, are those of the tutorials' Fourier features."""
    return any(prefix + key in state for key in _FREQUENCIES)


def infer_config(state: dict[str, Tensor], overrides: dict[str, Any], path: Path) -> ModelConfig:
    """ModelConfig of one of the tutorials' networks, whose sigma(t) is the published one."""
    first, last = state.get("conv1.weight"), state.get("tconv1.weight")
    if first is None or first.ndim != 4 or last is None or last.ndim != 4:
        raise CheckpointError(
            f"{path} is not a checkpoint of the tutorials: it lacks conv1.weight or tconv1.weight"
        )
    ngf, channels = first.shape[:2]
    arch = "unet_a" if "embed.W" in state else "unet_c" if len(last) == ngf else "unet_b"
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


def own_state(state: dict[str, Tensor], raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state by the names of this package."""
    return {
        _EMBED + key.removeprefix(_OTHER) if key.startswith(_OTHER) else key: value
        for key, value in state.items()
    }

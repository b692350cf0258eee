"""NCSN (2019) and NCSNv2 (2020): the network of a published state dict, from keys and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.checkpoints.sampling_settings import with_sampling_settings
from ncsn_fast.checkpoints.torch_file import CheckpointError
from ncsn_fast.models.architectures import ARCHITECTURES
from ncsn_fast.models.score import ModelConfig

NAME = "NCSN (2019) and NCSNv2 (2020)"
_EXAMPLES = {name: ModelConfig(arch=name) for name in ARCHITECTURES}


def examples() -> Mapping[str, ModelConfig]:
    """Networks of this family by name, for messages about foreign files."""
    return _EXAMPLES


def recognises(state: Mapping[Any, Any], prefix: str = "") -> bool:
    """Tells whether keys, after a prefix, are those of the RefineNets."""
    return f"{prefix}begin_conv.weight" in state


def infer_config(state: dict[str, Tensor], overrides: dict[str, Any], path: Path) -> ModelConfig:
    """ModelConfig from keys and shapes, completed by a published run that fits, and overrides."""
    first, table, ladder = (
        state.get(k) for k in ("begin_conv.weight", "normalizer.embed.weight", "sigmas")
    )
    levels = ladder if table is None else table
    if first is None or first.ndim != 4 or levels is None or levels.ndim == 0 or len(levels) == 0:
        raise CheckpointError(
            f"{path} is not an NCSN or NCSNv2 checkpoint: it lacks begin_conv.weight, or both "
            "sigmas and normalizer.embed.weight"
        )
    suffix = "_deepest" if _has(state, "res31.") else "_deeper" if _has(state, "res5.") else ""
    ngf, channels = first.shape[:2]
    begin, end = 1.0, 0.01  # NCSN (2019), which stores no ladder
    if ladder is not None and ladder.ndim == 1 and ladder.is_floating_point() and len(ladder):
        begin, end = float(ladder[0]), float(ladder[-1])
    found: dict[str, Any] = {
        "arch": ("ncsnv2" if table is None else "ncsn") + suffix,
        "channels": channels, "ngf": ngf, "norm": _norm(state),
        "n_sigmas": len(levels), "sigma_begin": begin, "sigma_end": end,
    }  # fmt: skip
    try:
        complete = with_sampling_settings({**found, **overrides})
        return ModelConfig.from_dict({**complete, **overrides})
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _has(state: dict[str, Tensor], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in state)


def _norm(state: dict[str, Tensor]) -> str:
    keys = {key.removeprefix("normalizer.") for key in state if key.startswith("normalizer.")}
    if "running_mean" in keys:
        return "BatchNorm"
    if keys == {"alpha"}:
        return "VarianceNorm"
    return "InstanceNorm++" if keys else "InstanceNorm"


def own_state(state: dict[str, Tensor], raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state, with the embedding tables of norms completed.

    Those of norms without bias, 2C columns (gamma, alpha), get zeros for beta.
    """
    if not _without_bias(raw):
        return state
    return {
        key: torch.cat((value, value.new_zeros(len(value), value.shape[1] // 2)), dim=1)
        if key.endswith("embed.weight") and value.ndim == 2
        else value
        for key, value in state.items()
    }


def _without_bias(state: dict[str, Tensor]) -> bool:
    # Networks without these tensors may hold other tables.
    table, first = (state.get(key) for key in ("normalizer.embed.weight", "begin_conv.weight"))
    return table is not None and first is not None and table.shape[1:] == (2 * len(first),)

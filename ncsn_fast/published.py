"""The authors' .pth checkpoints of NCSN (2019) and NCSNv2 (2020), read as they were published.

A file is a list: [score state dict, optimiser state dict, epoch, step, EMA dict], the first two
    entries alone for NCSN, the EMA dict only where training kept one. It holds no configuration, so
    the network is inferred from keys and shapes; what cannot be (image size, step size) comes from
    the published run it resembles, or from the caller.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ncsn_fast import sigmas as ladders
from ncsn_fast.checkpoint import CheckpointError, fill_model, read_torch
from ncsn_fast.configs import CONFIGS, TrainConfig
from ncsn_fast.models.score import ModelConfig, ScoreModel

log = logging.getLogger(__name__)

_PREFIX = "module."
_DEFAULT_SIZE = {
    "ncsnv2": 32,
    "ncsnv2_deeper": 128,
    "ncsnv2_deepest": 256,
    "ncsn": 32,
    "ncsn_deeper": 64,
}


def load_published(
    path: Path, *, weights: Literal["ema", "raw"] = "ema", overrides: dict[str, Any] | None = None
) -> ScoreModel:
    """ScoreModel of a published .pth; `overrides` are fields of ModelConfig. Raises
    CheckpointError."""
    raw, averaged = _split(read_torch(path), path)
    config = _infer(raw, overrides or {}, path)
    state = {key: value for key, value in raw.items() if key == "sigmas"}
    state |= averaged if weights == "ema" and averaged is not None else raw
    state.setdefault(
        "sigmas", ladders.geometric(config.sigma_begin, config.sigma_end, config.n_sigmas)
    )
    try:
        model = ScoreModel(config, state["sigmas"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    named = {
        key if key == "sigmas" else f"net.{key}": _full_table(key, t, model)
        for key, t in state.items()
    }
    log.info(
        "%s: %s, ngf %d, %d levels, %s weights; sampling at %dx%d with epsilon %.3g",
        path, config.arch, config.ngf, config.n_sigmas,
        "averaged" if weights == "ema" and averaged is not None else "raw",
        *config.image_size, config.epsilon,
    )  # fmt: skip
    return fill_model(model, named, str(path))


def _split(contents: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Raw weights without prefix, and the EMA weights if there are any."""
    if not isinstance(contents, list) or len(contents) not in (2, 4, 5):
        kind = (
            f"{type(contents).__name__} of {len(contents)}"
            if hasattr(contents, "__len__")
            else type(contents)
        )
        raise CheckpointError(
            f"{path} is not a published NCSN checkpoint: expected a list of 2, 4 or 5 entries "
            f"[score, optimizer, epoch, step, ema]; got {kind}"
        )
    raw = {
        key.removeprefix(_PREFIX): value
        for key, value in _tensors(contents[0], path, "score").items()
    }
    averaged = _tensors(contents[4], path, "ema") if len(contents) == 5 else None
    if averaged is not None:
        averaged = {key.removeprefix(_PREFIX): value for key, value in averaged.items()}
    return raw, averaged


def _tensors(entry: Any, path: Path, what: str) -> dict[str, Tensor]:
    if (
        not isinstance(entry, dict)
        or not entry
        or not all(isinstance(v, Tensor) for v in entry.values())
    ):
        raise CheckpointError(f"{path}: its {what} entry is not a state dict of tensors")
    return {str(key): value for key, value in entry.items()}


def _infer(state: dict[str, Tensor], overrides: dict[str, Any], path: Path) -> ModelConfig:
    """ModelConfig from keys and shapes, completed by the published run that fits and by the
    overrides."""
    try:
        ngf, channels = state["begin_conv.weight"].shape[:2]
        conditional = "normalizer.embed.weight" in state
        stem = "ncsn" if conditional else "ncsnv2"
        suffix = "_deepest" if _has(state, "res31.") else "_deeper" if _has(state, "res5.") else ""
        n = len(state["normalizer.embed.weight"] if conditional else state["sigmas"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not an NCSN or NCSNv2 checkpoint: it has no {error}"
        ) from error
    ladder = state.get("sigmas")
    begin, end = (1.0, 0.01) if ladder is None else (float(ladder[0]), float(ladder[-1]))
    found: dict[str, Any] = {
        "arch": stem + suffix, "channels": channels, "ngf": ngf, "norm": _norm(state),
        "n_sigmas": n,
        "sigma_begin": begin, "sigma_end": end,
    }  # fmt: skip
    values = {**found, **_sampling_settings(found), **overrides}
    try:
        return ModelConfig.from_dict(values)
    except ValueError as error:
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


def _sampling_settings(found: dict[str, Any]) -> dict[str, Any]:
    """Image size and Langevin step: those of the published run with this network and ladder, else
    derived."""
    for config in CONFIGS.values():
        if _same_run(config, found):
            size = (config.image_size, config.image_size)
            return {
                "image_size": size,
                "epsilon": config.epsilon,
                "n_steps_each": config.n_steps_each,
            }
    side = 28 if found["channels"] == 1 and found["ngf"] == 64 else _DEFAULT_SIZE[found["arch"]]
    if found["arch"].startswith("ncsnv2"):
        steps = 5
        ladder = ladders.geometric(found["sigma_begin"], found["sigma_end"], found["n_sigmas"])
        epsilon = ladders.epsilon_for(ladder, steps)
    else:
        steps, epsilon = 100, 2e-5
    return {"image_size": (side, side), "epsilon": epsilon, "n_steps_each": steps}


def _same_run(config: TrainConfig, found: dict[str, Any]) -> bool:
    exact = all(
        found[key] == getattr(config, key) for key in ("arch", "channels", "ngf", "n_sigmas")
    )
    return exact and abs(found["sigma_begin"] / max(config.sigma_begin, 1e-9) - 1) < 1e-3


def _full_table(key: str, tensor: Tensor, model: ScoreModel) -> Tensor:
    """Embedding tables without bias have 2C columns (gamma, alpha); a zero beta completes them."""
    if not key.endswith("embed.weight") or tensor.ndim != 2:
        return tensor
    expected = model.state_dict().get(f"net.{key}")
    if expected is None or tensor.shape[1] * 3 != expected.shape[1] * 2:
        return tensor
    return torch.cat(
        (tensor, tensor.new_zeros(len(tensor), expected.shape[1] - tensor.shape[1])), dim=1
    )

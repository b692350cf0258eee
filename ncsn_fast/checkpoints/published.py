"""The authors' .pth checkpoints of NCSN (2019), NCSNv2 (2020) and the score-SDE tutorial.

Those of NCSN and NCSNv2 are a list: [score state dict, optimiser state dict, epoch, step, EMA
dict], the first two entries alone for NCSN, the EMA dict only where training kept one. The
tutorial's is a state dict. None holds a configuration, so the network is inferred from keys and
shapes; what cannot be (image size, step size, sigma of t) comes from the published run it
resembles, or from the caller.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncsn_fast.checkpoints.model_folder import CheckpointError, Weights, build_model, check_tensors
from ncsn_fast.diffusion import schedule as ladders
from ncsn_fast.models.score import TIME_STYLE, ModelConfig, ScoreModel
from ncsn_fast.models.unet import TIME_ARCHS, VERSIONS, Clock
from ncsn_fast.training.configs import CONFIGS, TrainConfig

log = logging.getLogger(__name__)

_PREFIX = "module."
_BUFFERS = ("sigmas", "running_mean", "running_var", "num_batches_tracked")
_LADDER = {"sigma_begin", "sigma_end", "n_sigmas"}
_DEFAULT_SIZE = {
    "ncsnv2": 32,
    "ncsnv2_deeper": 128,
    "ncsnv2_deepest": 256,
    "ncsn": 32,
    "ncsn_deeper": 64,
    **dict.fromkeys(TIME_ARCHS, 28),
}
_FREQUENCIES = {"embed.W": "unet_a", "embed.0.W": "unet_b"}  # keys of the tutorial's networks


def from_published(
    contents: Any, path: Path, *, weights: Weights = "ema", overrides: dict[str, Any] | None = None
) -> ScoreModel:
    """ScoreModel from what read_torch found in a published .pth.

    Args:
        path: for messages.
        overrides: fields of ModelConfig, which win over what was inferred.

    Raises:
        CheckpointError: it is not such a file, or its weights do not fit.
    """
    overrides = overrides or {}
    raw, averaged = _split(contents, path)
    infer = _infer_unet if _is_unet(raw) else _infer
    config = infer(raw, overrides, path)
    kind = "averaged" if weights == "ema" and averaged is not None else "raw"
    state = raw
    if averaged is not None and kind == "averaged":  # it holds parameters only
        state = averaged | {key: value for key, value in raw.items() if key.endswith(_BUFFERS)}
    if "sigmas" not in raw or _LADDER & set(overrides):
        ladder = ladders.geometric(config.sigma_begin, config.sigma_end, config.n_sigmas)
        state = {**state, "sigmas": ladder}
    named = {
        key if key == "sigmas" else f"net.{key}": _full_table(key, value, raw)
        for key, value in state.items()
    }
    log.info(
        "%s: %s, ngf %d, %d levels, %s weights; sampling at %dx%d with epsilon %.3g",
        path, config.arch, config.ngf, config.n_sigmas, kind, *config.image_size, config.epsilon,
    )  # fmt: skip
    return build_model(config, named, str(path))


def _split(contents: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Raw weights and EMA weights (None without), both without prefix."""
    if isinstance(contents, dict) and _is_unet(contents):
        contents = [contents, {}]
    if not isinstance(contents, (list, tuple)) or len(contents) not in (2, 4, 5):
        size = f" of {len(contents)}" if hasattr(contents, "__len__") else ""
        raise CheckpointError(
            f"{path} is not a published NCSN checkpoint: expected a list of 2, 4 or 5 entries "
            f"[score, optimizer, epoch, step, ema]; got a {type(contents).__name__}{size}"
        )
    entries = [check_tensors(contents[0], f"{path}: its score entry")]
    if len(contents) == 5:
        entries.append(check_tensors(contents[4], f"{path}: its ema entry"))
    bare = [{key.removeprefix(_PREFIX): t for key, t in entry.items()} for entry in entries]
    return bare[0], bare[1] if len(bare) == 2 else None


def _infer(state: dict[str, Tensor], overrides: dict[str, Any], path: Path) -> ModelConfig:
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
    if ladder is not None and ladder.ndim == 1 and len(ladder):
        begin, end = float(ladder[0]), float(ladder[-1])
    found: dict[str, Any] = {
        "arch": ("ncsnv2" if table is None else "ncsn") + suffix,
        "channels": channels, "ngf": ngf, "norm": _norm(state),
        "n_sigmas": len(levels), "sigma_begin": begin, "sigma_end": end,
    }  # fmt: skip
    try:
        return ModelConfig.from_dict({**_sampling_settings({**found, **overrides}), **overrides})
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _is_unet(state: dict[Any, Any]) -> bool:
    return any(prefix + key in state for key in _FREQUENCIES for prefix in ("", _PREFIX))


def _infer_unet(state: dict[str, Tensor], overrides: dict[str, Any], path: Path) -> ModelConfig:
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
        return ModelConfig.from_dict(_sampling_settings(found))
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


def _sampling_settings(found: dict[str, Any]) -> dict[str, Any]:
    """`found` with image size and Langevin step: a like published run's, else derived."""
    for config in CONFIGS.values():
        if _same_run(config, found):
            size = (config.image_size, config.image_size)
            steps, epsilon = config.n_steps_each, config.epsilon
            break
    else:
        mnist = found["channels"] == 1 and found["ngf"] == 64
        side = 28 if mnist else _DEFAULT_SIZE.get(found["arch"], 32)
        size, steps, epsilon = (side, side), 100, 2e-5
        if found["arch"] not in ("ncsn", "ncsn_deeper"):
            steps = found.get("n_steps_each", 5)
            ladder = ladders.geometric(found["sigma_begin"], found["sigma_end"], found["n_sigmas"])
            epsilon = ladders.epsilon_for(ladder, steps)
    return {"image_size": size, "epsilon": epsilon, "n_steps_each": steps, **found}


def _same_run(config: TrainConfig, found: dict[str, Any]) -> bool:
    exact = all(
        found[key] == getattr(config, key) for key in ("arch", "channels", "ngf", "n_sigmas")
    )
    return exact and abs(found["sigma_begin"] / max(config.sigma_begin, 1e-9) - 1) < 1e-3


def _full_table(key: str, table: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Completes embedding tables of norms without bias, 2C columns (gamma, alpha), by zeros."""
    if not key.endswith("embed.weight") or table.ndim != 2 or not _without_bias(state):
        return table
    return torch.cat((table, table.new_zeros(len(table), table.shape[1] // 2)), dim=1)


def _without_bias(state: dict[str, Tensor]) -> bool:
    return state["normalizer.embed.weight"].shape[1:] == (2 * len(state["begin_conv.weight"]),)

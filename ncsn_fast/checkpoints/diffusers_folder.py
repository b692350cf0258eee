"""Folders of diffusers: a UNet2DModel, and the scheduler that says what it predicts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ncsn_fast.checkpoints import diffusers_unet
from ncsn_fast.checkpoints.model_folder import CONFIG_NAME, check_fit
from ncsn_fast.checkpoints.safetensors_file import read_safetensors
from ncsn_fast.checkpoints.torch_file import CheckpointError, check_tensors, read_torch
from ncsn_fast.data import limits
from ncsn_fast.data.json_file import JSONError, find_json, read_json
from ncsn_fast.diffusion.parameterisation import DiscreteVP
from ncsn_fast.models.adapter import WrappedConfig, check_chain
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.models.wrap import wrap

log = logging.getLogger(__name__)
UNET, SCHEDULER, SCHEDULER_NAME = "unet", "scheduler", "scheduler_config.json"
WEIGHTS_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_BETAS: dict[str, Any] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
}
_PREDICTS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "denoised"}
_OVERRIDES = (
    "image_size",
    "n_classes",
    "sigma_begin",
    "sigma_end",
    "n_sigmas",
    "n_steps_each",
    "epsilon",
)


def unet_folder(folder: Path) -> Path | None:
    """The folder of the network: `unet` in a pipeline's, or itself; None if it is none of both."""
    for place in (folder / UNET, folder):
        found = find_json(place / CONFIG_NAME)
        if found is not None and "_class_name" in found:
            return place
    return None


def load_diffusers(folder: Path, overrides: Mapping[str, Any]) -> ScoreModel:
    """ScoreModel from a pipeline's folder, or one of its network.

    Args:
        overrides: image_size; n_classes, one less than there are where the last means no class;
            sigma_begin, sigma_end, n_sigmas, n_steps_each and epsilon.

    Raises:
        CheckpointError: the folder is not complete, or of a network or scheduler that is not known.
    """
    place = unet_folder(folder)
    assert place is not None
    described = place / CONFIG_NAME
    try:
        config = read_json(described)
        scheduler, said = _scheduler(folder, place)
        options = options_of(scheduler)
        state, weights = _weights(place)
        net = diffusers_unet.build(config, len(state))
        with_weights(net, state, weights)
        return described_model(net, config, options, overrides, (folder, said))
    except JSONError as error:
        raise CheckpointError(str(error)) from error
    except CheckpointError:
        raise
    except Exception as error:  # a strange configuration makes diffusers raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"cannot use {folder}: {reason:.300}") from error


def described_model(
    net: nn.Module,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
    overrides: Mapping[str, Any],
    names: tuple[Any, Any],
) -> ScoreModel:
    """ScoreModel of a network of diffusers, which `save_pretrained` writes with its configuration.

    Args:
        config: of the network.   options: of `options_of`.   overrides: as for `load_diffusers`.
        names: of the source, and of what says what the network predicts, for the log.
    """
    model = wrap(net, **{**options, **_changes(config, options, overrides)})
    assert isinstance(model.config, WrappedConfig)
    model.config = dataclasses.replace(
        model.config, diffusers=config, identity=diffusers_unet.identity(config)
    )
    log.info(
        "%s: %s of diffusers; it predicts %s, after %s, for noise levels %.4g to %.4g; %dx%d "
        "pixels", names[0], diffusers_unet.CLASS, options["predicts"], names[1],
        model.config.sigma_begin, model.config.sigma_end, *model.config.image_size,
    )  # fmt: skip
    return model


def with_weights(net: nn.Module, state: Mapping[str, Tensor], where: Path) -> None:
    """Gives a network on the meta device its weights; CheckpointError if they do not fit."""
    own = diffusers_unet.own_state(state)
    try:
        check_fit(net.state_dict(), own, diffusers_unet.CLASS)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    net.load_state_dict(own, assign=True)


def _weights(place: Path) -> tuple[dict[str, Tensor], Path]:
    safe, other = (place / name for name in WEIGHTS_NAMES)
    if safe.exists():
        return read_safetensors(safe)[0], safe
    if other.exists():
        return check_tensors(read_torch(other), str(other)), other
    raise CheckpointError(f"{place} holds neither {' nor '.join(WEIGHTS_NAMES)}")


def _scheduler(folder: Path, place: Path) -> tuple[dict[str, Any], Path]:
    """The scheduler's configuration, and where it is."""
    places = (folder / SCHEDULER, place.parent / SCHEDULER, folder, place)
    for path in (holder / SCHEDULER_NAME for holder in places):
        if path.exists():
            return read_json(path), path
    raise CheckpointError(
        f"{folder} holds no {SCHEDULER}/{SCHEDULER_NAME}, which says what the network predicts; "
        "add it, or build the network and pass it to ncsn_fast.wrap(net, predicts=...)"
    )


def options_of(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `wrap` for the networks that a scheduler is for; ValueError if unknown."""
    name = str(scheduler.get("_class_name"))
    if name == "ScoreSdeVeScheduler":
        # The network takes sigma, and divides its output by it.
        return {
            "predicts": "score", "sees": "sigma", "data_range": (0.0, 1.0),
            "sigma_min": scheduler.get("sigma_min", 0.01),
            "sigma_max": scheduler.get("sigma_max", 1348.0),
        }  # fmt: skip
    predicted = scheduler.get("prediction_type")
    if name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        if predicted not in (None, "epsilon"):
            raise ValueError(f"prediction_type of {name} must be 'epsilon'; got {predicted!r}")
        return {
            "predicts": "edm", "sees": "log_sigma/4", "data_range": (-1.0, 1.0),
            "sigma_data": scheduler.get("sigma_data", 0.5),
            "sigma_min": scheduler.get("sigma_min", 0.002),
            "sigma_max": scheduler.get("sigma_max", 80.0),
        }  # fmt: skip
    if "beta_schedule" not in scheduler:
        raise ValueError(
            f"scheduler {name!r:.60} is not known: ScoreSdeVeScheduler, EDMEulerScheduler, and "
            "those with a beta_schedule are (DDPM, DDIM, Euler, ...)"
        )
    if predicted is None:  # older versions
        predicted = "epsilon" if scheduler.get("predict_epsilon", True) else "sample"
    if predicted not in _PREDICTS:
        raise ValueError(
            f"prediction_type must be one of {', '.join(_PREDICTS)}; got {predicted!r:.60}"
        )
    if scheduler.get("trained_betas") is not None or scheduler.get("rescale_betas_zero_snr"):
        raise ValueError(f"{name} has betas of its own; pass the network to ncsn_fast.wrap")
    if (betas := scheduler["beta_schedule"]) not in _BETAS:
        raise ValueError(f"beta_schedule must be one of {', '.join(_BETAS)}; got {betas!r:.60}")
    check_chain(n := scheduler.get("num_train_timesteps", 1000))
    process = DiscreteVP(
        n, scheduler.get("beta_start", 1e-4),
        scheduler.get("beta_end", 0.02), _BETAS[betas],
    )  # fmt: skip
    return {
        "predicts": _PREDICTS[predicted], "sees": "timestep", "process": process,
        "data_range": (-1.0, 1.0),
    }  # fmt: skip


def _changes(
    config: Mapping[str, Any], options: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of `wrap` that the network's configuration and the caller give."""
    if unknown := sorted(set(overrides) - set(_OVERRIDES)):
        raise ValueError(
            f"the files say what {', '.join(unknown)} is; {', '.join(_OVERRIDES)} can be given"
        )
    given = dict(overrides)
    size: Any = given.pop("image_size", None) or config.get("sample_size")
    if type(size) is int:
        size = (size, size)
    whole = isinstance(size, (list, tuple)) and len(size) == 2
    if not whole or any(type(n) is not int or n < 1 for n in size):
        raise ValueError(
            f"its sample_size is {size!r:.60}; give image_size, one number or two (height, width)"
        )
    limits.IMAGE_SIZE.check(max(size), f"sample_size {size[0]}x{size[1]}")
    low, high = options["data_range"]
    for name, end in (("sigma_begin", "sigma_max"), ("sigma_end", "sigma_min")):
        if name in given:
            given[end] = given.pop(name) * (high - low)
    known = config.get("num_class_embeds") or 0
    if given.setdefault("n_classes", known) > known:
        raise ValueError(
            f"n_classes must be at most {known}, its num_class_embeds; got {given['n_classes']}"
        )
    if config.get("time_embedding_type") == "learned" and "process" in options:  # of whole steps
        given["process"] = dataclasses.replace(options["process"], rounded=True)
    return {**given, "image_shape": (config.get("in_channels", 3), *size)}

"""`ncsn_fast.load`: a ScoreModel from whatever holds one."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from ncsn_fast.checkpoints import hub
from ncsn_fast.checkpoints.diffusers_folder import load_diffusers, unet_folder
from ncsn_fast.checkpoints.diffusers_pipeline import Pipeline, from_pipeline, is_pipeline
from ncsn_fast.checkpoints.edm import from_edm
from ncsn_fast.checkpoints.edm_pickle import is_edm
from ncsn_fast.checkpoints.model_folder import CONFIG_NAME, WEIGHTS_NAME, load_model_folder
from ncsn_fast.checkpoints.published import from_published
from ncsn_fast.checkpoints.safetensors_file import read_safetensors
from ncsn_fast.checkpoints.shipped import ASSETS, DEFAULT, shipped
from ncsn_fast.checkpoints.torch_file import CheckpointError, Weights, read_torch
from ncsn_fast.checkpoints.training_run import (
    CHECKPOINTS,
    is_run,
    newest_run,
    read_run,
    read_run_file,
)
from ncsn_fast.models.inputs import check_network
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.names import suggestion
from ncsn_fast.notices import notice

log = logging.getLogger(__name__)
SAFE = ".safetensors"
SHIPPED = ASSETS / DEFAULT


def load(
    source: str | Path | ScoreModel | Pipeline,
    *,
    weights: Weights = "ema",
    net: nn.Module | None = None,
    revision: str | None = None,
    **overrides: Any,
) -> ScoreModel:
    """A ScoreModel in evaluation mode, on the CPU, in float32.

    Args:
        source: a run folder, a model folder (config.json + model.safetensors), an authors' .pth
            or EDM's .pkl, a state dict as .safetensors, a folder of diffusers' UNet2DModel,
            OWNER/NAME of one of these on the Hugging Face Hub, the name of a model that ships,
            such as "digits" (shipped.py), a pipeline of diffusers in memory (its network is not
            copied), or a ScoreModel, which is returned as it is. A name that is a path here is
            that path.
        weights: "ema" takes the averaged weights where there are any, "raw" the others (runs and
            .pth files).
        net: the network of a model folder that `ncsn_fast.wrap` made, whose weights are replaced.
        revision: branch, tag or commit of a name on the Hub.
        overrides: what a file does not hold: image_size, epsilon, sigma_begin, ... as its kind
            needs them; run, the published run that one of score_sde is like.

    Raises:
        CheckpointError: unreadable, unsafe, incomplete or foreign files. No code in a file is ever
            run.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights must be 'ema' or 'raw'; got {weights!r}")
    if isinstance(source, ScoreModel):
        return source
    if not isinstance(source, str | os.PathLike):
        if is_pipeline(source):
            return from_pipeline(source, overrides)
        what = type(source).__name__
        if isinstance(source, type):
            what = f"the class {getattr(source, '__name__', what)}"
        raise TypeError(
            "a model is a path, a name, a pipeline of diffusers, or what ncsn_fast.wrap makes of a "
            f"network; got {what}"
        )
    path = Path(source).expanduser()
    if not path.exists():
        path = shipped().get(str(source), path)
    if hub.is_name(source):
        path = hub.fetch(source, revision)
    elif revision is not None:
        raise ValueError(f"revision is of a name on the Hub, and {source} is none")
    if net is not None:
        check_network(net)
        return load_model_folder(path, net)
    if path.name in (WEIGHTS_NAME, CONFIG_NAME):
        path = path.parent
    if path.is_file():
        return _load_file(path, weights, overrides)
    if path.is_dir() and not is_run(path) and unet_folder(path) is not None:
        return load_diffusers(path, overrides)
    if overrides:
        raise CheckpointError(
            f"{path} carries its own configuration; overrides are for published files only"
        )
    if not path.is_dir():
        raise CheckpointError(
            f"{path} does not exist{suggestion(source, shipped())}; a model is a run folder, a "
            "model folder, a published file, "
            f"OWNER/NAME on the Hugging Face Hub, or one that ships: {', '.join(shipped())}"
        )
    if is_run(path):
        return read_run(path).model(weights)
    if (path / CONFIG_NAME).exists():
        return load_model_folder(path)
    raise CheckpointError(
        f"{path} is neither a run (no {CHECKPOINTS}/step_*.pt) "
        f"nor a model folder (no {CONFIG_NAME})"
    )


def _load_file(path: Path, weights: Weights, overrides: dict[str, Any]) -> ScoreModel:
    if is_edm(path):
        return from_edm(path, overrides)
    contents = read_safetensors(path)[0] if path.suffix == SAFE else read_torch(path)
    if isinstance(contents, dict) and "train_config" in contents and not overrides:
        return read_run_file(path, contents).model(weights)
    return from_published(contents, path, weights=weights, overrides=overrides)


def resolve_model(model: str | Path | ScoreModel | Pipeline | None) -> ScoreModel:
    """The model that Sampler(model) means; a log line says which, for None."""
    if model is not None:
        return load(model)
    run = newest_run(Path("runs"))
    if run is not None:
        notice(log, "model: the newest run, %s", run)
        return load(run)
    log.info("model: the shipped digits model (no run below ./runs)")
    return load(SHIPPED)

"""EDM's files (Karras et al. 2022): a ScoreModel from the network that a pickle describes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ncsn_fast.checkpoints.edm_pickle import read_edm
from ncsn_fast.checkpoints.model_folder import build_model
from ncsn_fast.checkpoints.sampling_settings import with_ladder
from ncsn_fast.checkpoints.torch_file import CheckpointError
from ncsn_fast.models.score import ScoreModel
from ncsn_fast.models.unet_config import edm_config

log = logging.getLogger(__name__)
NAME = "EDM"
_PREFIX = "model."  # of the network in its wrapper, which has a table `u` beside it


def from_edm(path: Path, overrides: dict[str, Any] | None = None) -> ScoreModel:
    """ScoreModel of the averaged network in a published .pkl, of which no code is run.

    Args:
        overrides: fields of the ladder and of Langevin dynamics, which no file holds.

    Raises:
        CheckpointError: it is not such a file, or holds another network.
    """
    found = read_edm(path)
    try:
        config = edm_config(found.class_name, found.arguments)
        config = with_ladder(config, overrides or {})
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    state = {
        f"net.{key.removeprefix(_PREFIX)}": value
        for key, value in found.state.items()
        if key.startswith(_PREFIX)
    }
    log.info(
        "%s: %s of EDM with %s, %d classes; %dx%d pixels", path, config.arch, found.class_name,
        config.n_classes, *config.image_size,
    )  # fmt: skip
    return build_model(config, {"sigmas": config.ladder(), **state}, str(path))

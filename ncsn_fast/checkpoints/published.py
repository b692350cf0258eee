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

from torch import Tensor

from ncsn_fast.checkpoints import ncsn, tutorial
from ncsn_fast.checkpoints.model_folder import build_model
from ncsn_fast.checkpoints.torch_file import CheckpointError, Weights, check_tensors
from ncsn_fast.diffusion import schedule as ladders
from ncsn_fast.models.score import ScoreModel

log = logging.getLogger(__name__)

_PREFIX = "module."
_BUFFERS = ("sigmas", "running_mean", "running_var", "num_batches_tracked")
_LADDER = {"sigma_begin", "sigma_end", "n_sigmas"}


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
    family = tutorial if tutorial.recognises(raw) else ncsn
    config = family.infer_config(raw, overrides, path)
    kind = "averaged" if weights == "ema" and averaged is not None else "raw"
    state = raw
    if averaged is not None and kind == "averaged":  # it holds parameters only
        state = averaged | {key: value for key, value in raw.items() if key.endswith(_BUFFERS)}
    if "sigmas" not in raw or _LADDER & set(overrides):
        ladder = ladders.geometric(config.sigma_begin, config.sigma_end, config.n_sigmas)
        state = {**state, "sigmas": ladder}
    named = {
        key if key == "sigmas" else f"net.{key}": ncsn.full_table(key, value, raw)
        for key, value in state.items()
    }
    log.info(
        "%s: %s, ngf %d, %d levels, %s weights; sampling at %dx%d with epsilon %.3g",
        path, config.arch, config.ngf, config.n_sigmas, kind, *config.image_size, config.epsilon,
    )  # fmt: skip
    return build_model(config, named, str(path))


def _split(contents: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Raw weights and EMA weights (None without), both without prefix."""
    if isinstance(contents, dict) and _is_tutorial(contents):
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


def _is_tutorial(contents: dict[Any, Any]) -> bool:
    return any(tutorial.recognises(contents, prefix) for prefix in ("", _PREFIX))

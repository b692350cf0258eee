"""The authors' .pth files: NCSN (2019), NCSNv2 (2020), the score-SDE tutorials, score_sde_pytorch.

Those of NCSN and NCSNv2 are a list: [score state dict, optimiser state dict, epoch, step, EMA
dict], the first two entries alone for NCSN, the EMA dict only where training kept one. The
tutorials' is a state dict. score_sde's is a dict {model, ema, optimizer, step}, whose ema has a
list of tensors, those of the parameters that are trained, in their order. None holds a
configuration, so the network is inferred from keys and shapes; what cannot be (image size, step
size, sigma of t) comes from the published run it resembles, or from the caller.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from ncsn_fast.checkpoints import ncsn, score_sde, tutorial
from ncsn_fast.checkpoints.family import PREFIX, Family, foreign, without_prefix
from ncsn_fast.checkpoints.model_folder import build_model
from ncsn_fast.checkpoints.torch_file import CheckpointError, Weights, check_tensors
from ncsn_fast.diffusion import schedule as ladders
from ncsn_fast.models.score import ModelConfig, ScoreModel
from ncsn_fast.notices import notice

log = logging.getLogger(__name__)
FAMILIES: tuple[Family, ...] = (ncsn, tutorial, score_sde)

_BUFFERS = ("sigmas", "running_mean", "running_var", "num_batches_tracked")
_LADDER = {"sigma_begin", "sigma_end", "n_sigmas"}


def from_published(
    contents: Any, path: Path, *, weights: Weights = "ema", overrides: dict[str, Any] | None = None
) -> ScoreModel:
    """ScoreModel from what read_torch found in a published .pth.

    Args:
        path: for messages.
        overrides: what the file does not hold; it wins over what was inferred.

    Raises:
        CheckpointError: it is not such a file, or its weights do not fit.
    """
    overrides = overrides or {}
    raw, average = _split(contents, path)
    family = next((family for family in FAMILIES if family.recognises(raw)), None)
    if family is None:
        raise foreign(raw, path, FAMILIES)
    config = family.infer_config(raw, overrides, path)
    averaged = _averaged(average, raw, path) if weights == "ema" else None
    kind, state = "raw", raw
    if averaged is not None:  # it holds parameters only
        kind = "averaged"
        state = averaged | {key: value for key, value in raw.items() if key.endswith(_BUFFERS)}
    state = family.own_state(state, raw)
    if "sigmas" not in state or _LADDER & set(overrides):
        state = {**state, "sigmas": _ladder(config)}
    named = {key if key == "sigmas" else f"net.{key}": value for key, value in state.items()}
    notice(
        log, "%s: %s, %d levels, %s weights; sampling at %dx%d with epsilon %.3g",
        path, config.arch, config.n_sigmas, kind, *config.image_size, config.epsilon,
    )  # fmt: skip
    return build_model(config, named, str(path))


def _ladder(config: Any) -> Tensor:
    if isinstance(config, ModelConfig):
        return ladders.geometric(config.sigma_begin, config.sigma_end, config.n_sigmas)
    return config.ladder()


def _split(contents: Any, path: Path) -> tuple[dict[str, Tensor], Any]:
    """Raw weights, without prefix, and the entry of the averaged ones; None without any."""
    if isinstance(contents, dict) and _is_state_dict(contents):
        return _state(contents, f"{path}: its score entry"), None
    if isinstance(contents, dict) and _is_state_dict(contents.get("model")):
        return _state(contents["model"], f"{path}: its model entry"), contents.get("ema")
    if not isinstance(contents, (list, tuple)) or len(contents) not in (2, 4, 5):
        raise foreign(contents, path, FAMILIES)
    raw = _state(contents[0], f"{path}: its score entry")
    return raw, contents[4] if len(contents) == 5 else None


def _state(entry: Any, where: str) -> dict[str, Tensor]:
    return without_prefix(check_tensors(entry, where))


def _is_state_dict(contents: Any) -> bool:
    return isinstance(contents, dict) and any(
        family.recognises(contents, prefix) for family in FAMILIES for prefix in ("", PREFIX)
    )


def _averaged(entry: Any, raw: dict[str, Tensor], path: Path) -> dict[str, Tensor] | None:
    """The averaged weights: a state dict, or score_sde's list in the order of the parameters.

    The list leaves out parameters that are not trained: the frequencies of Fourier features.
    """
    where = f"{path}: its ema entry"
    values = entry.get("shadow_params", entry) if isinstance(entry, dict) else entry
    if values is None:
        return None
    if not isinstance(values, (list, tuple)):
        return _state(values, where)
    parameters = [key for key in raw if not key.endswith(_BUFFERS)]
    fixed = [key for key in parameters if key.endswith(".W") and raw[key].ndim == 1]
    names = parameters
    if len(values) == len(parameters) - len(fixed):
        names = [key for key in parameters if key not in fixed]
    if len(values) != len(names):
        raise CheckpointError(
            f"{where} has {len(values)} tensors, and its model {len(parameters)} parameters, "
            f"{len(fixed)} of them not trained; use weights='raw'"
        )
    named = check_tensors(dict(zip(names, values, strict=True)), where)
    if wrong := [key for key, value in named.items() if value.shape != raw[key].shape]:
        key = wrong[0]
        raise CheckpointError(
            f"{where} is not in the order of its model's parameters: the tensor for {key} has "
            f"shape {tuple(named[key].shape)}; expected {tuple(raw[key].shape)}; use weights='raw'"
        )
    return {key: raw[key] for key in fixed} | named

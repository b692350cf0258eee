"""The authors' .pth checkpoints of NCSN (2019), NCSNv2 (2020) and the score-SDE tutorial.

Those of NCSN and NCSNv2 are a list: [score state dict, optimiser state dict, epoch, step, EMA
dict], the first two entries alone for NCSN, the EMA dict only where training kept one. The
tutorial's is a state dict. None holds a configuration, so the network is inferred from keys and
shapes; what cannot be (image size, step size, sigma of t) comes from the published run it
resembles, or from the caller.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ncsn_fast.checkpoints import ncsn, tutorial
from ncsn_fast.checkpoints.model_folder import build_model
from ncsn_fast.checkpoints.torch_file import (
    CheckpointError,
    Weights,
    check_tensors,
    key_differences,
)
from ncsn_fast.diffusion import schedule as ladders
from ncsn_fast.models.score import ModelConfig, ScoreModel

log = logging.getLogger(__name__)


class Family(Protocol):
    """One published code base: a module that knows its files by the keys of their state dicts.

    Attributes:
        NAME: for messages.
        EXAMPLES: its networks by name, for messages about foreign files.
    """

    NAME: str
    EXAMPLES: Mapping[str, ModelConfig]

    def recognises(self, state: Mapping[Any, Any], prefix: str = "", /) -> bool:
        """Tells whether keys, after a prefix, are those of this family."""

    def infer_config(
        self, state: dict[str, Tensor], overrides: dict[str, Any], path: Path, /
    ) -> ModelConfig:
        """Returns the configuration of a network with these weights."""

    def own_state(self, state: dict[str, Tensor], raw: dict[str, Tensor], /) -> dict[str, Tensor]:
        """Returns the state, raw or averaged, by the names and shapes of this package."""


FAMILIES: tuple[Family, ...] = (ncsn, tutorial)

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
    family = next((family for family in FAMILIES if family.recognises(raw)), None)
    if family is None:
        raise _foreign(raw, path)
    config = family.infer_config(raw, overrides, path)
    kind = "averaged" if weights == "ema" and averaged is not None else "raw"
    state = raw
    if averaged is not None and kind == "averaged":  # it holds parameters only
        state = averaged | {key: value for key, value in raw.items() if key.endswith(_BUFFERS)}
    if "sigmas" not in raw or _LADDER & set(overrides):
        ladder = ladders.geometric(config.sigma_begin, config.sigma_end, config.n_sigmas)
        state = {**state, "sigmas": ladder}
    named = {
        key if key == "sigmas" else f"net.{key}": value
        for key, value in family.own_state(state, raw).items()
    }
    log.info(
        "%s: %s, ngf %d, %d levels, %s weights; sampling at %dx%d with epsilon %.3g",
        path, config.arch, config.ngf, config.n_sigmas, kind, *config.image_size, config.epsilon,
    )  # fmt: skip
    return build_model(config, named, str(path))


def _split(contents: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Raw weights and EMA weights (None without), both without prefix."""
    if isinstance(contents, dict) and _is_state_dict(contents):
        contents = [contents, {}]
    if not isinstance(contents, (list, tuple)) or len(contents) not in (2, 4, 5):
        raise _foreign(contents, path)
    entries = [check_tensors(contents[0], f"{path}: its score entry")]
    if len(contents) == 5:
        entries.append(check_tensors(contents[4], f"{path}: its ema entry"))
    bare = [_without_prefix(entry) for entry in entries]
    return bare[0], bare[1] if len(bare) == 2 else None


def _is_state_dict(contents: dict[Any, Any]) -> bool:
    return any(
        family.recognises(contents, prefix) for family in FAMILIES for prefix in ("", _PREFIX)
    )


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(_PREFIX): value for key, value in state.items()}


def _foreign(contents: Any, path: Path) -> CheckpointError:
    """The error for a file of no known family: what is known, and which network is nearest."""
    names = ", ".join(family.NAME for family in FAMILIES)
    known = (
        f"{path} is not a published checkpoint that is known here ({names}: a list [score, "
        "optimizer, epoch, step, ema], or a state dict), nor one of ncsn_fast.train"
    )
    found = max(_state_dicts(contents), key=len, default=None)
    if found is None:
        size = f" of {len(contents)}" if isinstance(contents, (dict, list, tuple, str)) else ""
        return CheckpointError(f"{known}; it is a {type(contents).__name__}{size} without weights")
    keys = set(_without_prefix(found))
    common, family, name, config = max(
        (
            (_likeness(keys, _keys(example)), family, name, example)
            for family in FAMILIES
            for name, example in family.EXAMPLES.items()
        ),
        key=lambda row: row[0],
    )
    if common == 0:
        some = ", ".join(itertools.islice(found, 4))
        return CheckpointError(
            f"{known}; none of its {len(keys)} keys ({some}, ...) is one of theirs"
        )
    expected = _keys(config)
    return CheckpointError(
        f"{known}. Nearest is {name} of {family.NAME}, with {len(keys & expected)} of its "
        f"{len(expected)} keys: {key_differences(expected, keys) or 'only the container differs'}"
    )


def _likeness(keys: set[str], others: set[str]) -> float:
    """Share of common keys, from 0 to 1 (Jaccard's index)."""
    return len(keys & others) / len(keys | others)


def _keys(config: ModelConfig) -> set[str]:
    """Keys of a network's state dict as it is published."""
    with torch.device("meta"):
        model = ScoreModel(config)
    sigmas = set() if model.conditioning != "none" else {"sigmas"}
    return set(model.net.state_dict()) | sigmas


def _state_dicts(contents: Any, depth: int = 4) -> Iterator[dict[str, Tensor]]:
    """The tensors with a name of every dict within a file, a few levels deep."""
    if depth == 0 or not isinstance(contents, (dict, list, tuple)):
        return
    if isinstance(contents, dict):
        named = {k: v for k, v in contents.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if named:
            yield named
    for value in itertools.islice(
        contents.values() if isinstance(contents, dict) else contents, 1000
    ):
        yield from _state_dicts(value, depth - 1)

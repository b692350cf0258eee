"""Families of published checkpoints, and the error for files of none, which names the nearest."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ncsn_fast.checkpoints.torch_file import CheckpointError, key_differences
from ncsn_fast.models.published_unets import PUBLISHED_UNETS
from ncsn_fast.models.score import ModelConfig, ScoreModel
from ncsn_fast.models.shapes import shapes_only
from ncsn_fast.models.unet_config import UNetConfig

PREFIX = "module."  # of the keys of a network that was trained on several devices
_REMEDY = "build its network, load the weights, and pass it to ncsn_fast.wrap"
_LIKE = 0.5  # share of common keys below which a file is of another network
# What else is read, for messages.
OTHERS = "EDM's .pkl, folders of diffusers' UNet2DModel, and models of this package"
_EDM = ("edm-cifar10-32x32-uncond-vp", "edm-cifar10-32x32-uncond-ve", "edm-imagenet-64x64-cond-adm")


class Family(Protocol):
    """One published code base: a module that knows its files by the keys of their state dicts."""

    NAME: str

    def examples(self) -> Mapping[str, ModelConfig] | Mapping[str, UNetConfig]:
        """Networks by name, for messages about foreign files."""

    def recognises(self, state: Mapping[Any, Any], prefix: str = "", /) -> bool:
        """Tells whether keys, after a prefix, are those of this family."""

    def infer_config(
        self, state: dict[str, Tensor], overrides: dict[str, Any], path: Path, /
    ) -> ModelConfig | UNetConfig:
        """Returns the configuration of a network with these weights."""

    def own_state(self, state: dict[str, Tensor], raw: dict[str, Tensor], /) -> dict[str, Tensor]:
        """Returns the state, raw or averaged, by the names and shapes of this package."""


def without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without PREFIX before its keys."""
    return {key.removeprefix(PREFIX): value for key, value in state.items()}


def foreign(contents: Any, path: Path, families: tuple[Family, ...]) -> CheckpointError:
    """The error for a file of no family: what is known, and which network is nearest."""
    names = ", ".join(family.NAME for family in families)
    known = f"{path} is not a published checkpoint that is known here (.pth of {names}; {OTHERS})"
    found = max(_state_dicts(contents), key=len, default=None)
    if found is None:
        size = f" of {len(contents)}" if isinstance(contents, (dict, list, tuple, str)) else ""
        return CheckpointError(f"{known}; it is a {type(contents).__name__}{size} without weights")
    keys = set(without_prefix(found))
    if any(key.startswith("down_blocks.") for key in keys):
        return CheckpointError(
            f"{known}; its keys are of a network of diffusers: give the folder, with the "
            "config.json that describes it"
        )
    of, name, expected = max(_examples(families), key=lambda row: _likeness(keys, row[2]))
    if not keys & expected:
        some = ", ".join(itertools.islice(found, 4))
        return CheckpointError(
            f"{known}; none of its {len(keys)} keys ({some}, ...) is one of theirs: {_REMEDY}"
        )
    remedy = f". Or {_REMEDY}" if _likeness(keys, expected) < _LIKE else ""
    return CheckpointError(
        f"{known}. Nearest is {name} of {of}, with {len(keys & expected)} of its "
        f"{len(expected)} keys: {key_differences(expected, keys) or 'only the container differs'}"
        f"{remedy}"
    )


@functools.cache
def _examples(families: tuple[Family, ...]) -> list[tuple[str, str, set[str]]]:
    """Family, name and keys of every network that a file may be near to."""
    found = [
        (family.NAME, name, _keys(config))
        for family in families
        for name, config in family.examples().items()
    ]
    for name in _EDM:
        keys = _keys(PUBLISHED_UNETS[name].config()) - {"sigmas"}
        found.append(("EDM, whose .pkl is read", name, {f"model.{key}" for key in keys}))
    return found


def _likeness(keys: set[str], others: set[str]) -> float:
    """Share of common keys, from 0 to 1 (Jaccard's index)."""
    return len(keys & others) / len(keys | others)


def _keys(config: ModelConfig | UNetConfig) -> set[str]:
    """Keys of a network's state dict as it is published."""
    with shapes_only():
        model = ScoreModel(config)
    stored = isinstance(config, UNetConfig) or model.conditioning == "none"
    return set(model.net.state_dict()) | ({"sigmas"} if stored else set())


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

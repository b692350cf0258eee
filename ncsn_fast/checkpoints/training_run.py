"""Run folders of `ncsn_fast.train`: their checkpoints, oldest to newest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ncsn_fast.checkpoints.model_folder import build_model, config_from_json
from ncsn_fast.checkpoints.torch_file import (
    CheckpointError,
    Weights,
    check_tensors,
    is_plain,
    read_torch,
)
from ncsn_fast.data.json_file import JSONError, find_json, parse_json
from ncsn_fast.models.score import ModelConfig, ScoreModel
from ncsn_fast.models.unet_config import UNetConfig

CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class RunCheckpoint:
    """One training checkpoint as read from disk; `contents` is Trainer.state_dict()."""

    path: Path
    step: int
    model_config: ModelConfig | UNetConfig
    train_config: dict[str, Any]
    contents: dict[str, Any]

    def model(self, weights: Weights = "ema") -> ScoreModel:
        """The model with the averaged weights (where there are any) or the raw ones."""
        state = self.contents["ema"] if weights == "ema" else None
        state = self.contents["model"] if state is None else state
        return build_model(self.model_config, state, str(self.path))


def checkpoint_paths(run: Path) -> list[Path]:
    """Checkpoints of a run folder, oldest first."""
    return sorted((run / CHECKPOINTS).glob("step_*.pt"))


def is_run(folder: Path) -> bool:
    """Returns whether a folder holds checkpoints of a training run."""
    return bool(checkpoint_paths(folder))


def training_data(run: Path) -> str | None:
    """Returns the --data that a run was trained on, from its config.json; None if it has none."""
    data = (find_json(run / "config.json") or {}).get("data")
    return data if isinstance(data, str) else None


def newest_run(runs: Path) -> Path | None:
    """The run below `runs` whose newest checkpoint is the most recent; None if there is none."""
    if not runs.is_dir():
        return None
    found = [folder for folder in runs.iterdir() if folder.is_dir() and is_run(folder)]
    return max(found, key=lambda run: checkpoint_paths(run)[-1].stat().st_mtime, default=None)


def read_run(run: Path) -> RunCheckpoint:
    """The newest checkpoint of a run folder."""
    paths = checkpoint_paths(run)
    if not paths:
        raise CheckpointError(
            f"{run} holds no checkpoints; train it first (python -m ncsn_fast.train)"
        )
    try:
        return read_run_file(paths[-1])
    except CheckpointError as error:
        if len(paths) == 1:
            raise
        raise CheckpointError(
            f"{error} To go on from {paths[-2].name}, the checkpoint before it, "
            f"delete {paths[-1].name}."
        ) from error


def read_run_file(path: Path, contents: Any = None) -> RunCheckpoint:
    """One checkpoint file of a run (its contents, if they have been read already)."""
    contents = read_torch(path) if contents is None else contents
    kinds: dict[str, Any] = {
        "step": int, "model": dict, "ema": (dict, type(None)), "optimizer": dict,
        "model_config": str, "train_config": str,
    }  # fmt: skip
    if not isinstance(contents, dict) or not all(
        isinstance(contents.get(key, ...), kind) for key, kind in kinds.items()
    ):
        raise CheckpointError(f"{path} is not a checkpoint of ncsn_fast.train")
    for name in ("step", "n_images"):
        number = contents.get(name, 0)
        if type(number) is not int or not 0 <= number < 2**53:
            raise CheckpointError(f"{path}: {name} must be a number from 0 on; got {number!r:.40}")
    averages = contents.get("averages", {})
    if not isinstance(averages, dict) or not isinstance(contents.get("ema_name", ""), str):
        raise CheckpointError(f"{path}: its averages are not a dict of state dicts")
    for name, state in (*((n, contents[n]) for n in ("model", "ema")), *averages.items()):
        if state is not None:
            check_tensors(state, f"{path}: its {name} entry")
    if not all(map(is_plain, _tensors(contents["optimizer"]))):
        raise CheckpointError(f"{path}: its optimizer entry is not of plain dense tensors")
    config = config_from_json(contents["model_config"], contents["model"], str(path))
    try:
        settings = parse_json(contents["train_config"], f"{path}, train_config")
    except JSONError as error:
        raise CheckpointError(str(error)) from error
    return RunCheckpoint(path, contents["step"], config, settings, contents)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts, lists and tuples, each once."""
    todo, seen = [value], set[int]()
    while todo:
        if id(value := todo.pop()) not in seen:
            seen.add(id(value))
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, (dict, list, tuple)):
                todo.extend(value.values() if isinstance(value, dict) else value)

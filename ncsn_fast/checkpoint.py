"""Reading and writing models: model folders, run folders, and the authors' published .pth files.

Nothing here unpickles code: every torch.load has weights_only=True.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ncsn_fast.files import atomic_write
from ncsn_fast.models.score import ModelConfig, ScoreModel

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CHECKPOINTS = "checkpoints"
SHIPPED = Path(__file__).parent / "assets" / "digits"


class CheckpointError(ValueError):
    """A file that cannot be used as a model; the message says why and what to do."""


def read_torch(path: Path) -> Any:
    """torch.load without code execution, on the CPU; CheckpointError for anything else than plain
    tensors."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors (or is no checkpoint), "
            f"and reading it could run code: refused. "
            "Re-save its state dicts with torch.save."
        ) from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
    ) as error:
        first_line = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"cannot read {path} as a torch checkpoint ({first_line}); is the file complete?"
        ) from error


def fill_model(model: ScoreModel, state: dict[str, Tensor], where: str) -> ScoreModel:
    """Copies weights into the model; CheckpointError on missing or extra keys, wrong shapes,
    NaN."""
    expected = model.state_dict()
    missing, extra = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or extra:
        parts = [
            f"{kind} {_some(keys)}"
            for kind, keys in (("missing", missing), ("unexpected", extra))
            if keys
        ]
        raise CheckpointError(
            f"{where} does not fit network {model.config.arch!r}: {'; '.join(parts)}"
        )
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise CheckpointError(
                f"{where}: {key} has shape {tuple(tensor.shape)}; "
                f"expected {tuple(expected[key].shape)}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{where}: {key} holds NaN or infinite values; use another checkpoint"
            )
    model.load_state_dict(state)
    return model.eval()


def _some(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def save_model(model: ScoreModel, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Writes a model folder: config.json and model.safetensors.

    Args:
        dtype: type of the stored weights (None: as they are). Loading gives float32 whatever it is.
    """
    folder = Path(folder)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    if dtype is not None:
        state = {
            k: v.to(dtype) if v.is_floating_point() and k != "sigmas" else v
            for k, v in state.items()
        }
    with atomic_write(folder / WEIGHTS_NAME) as path:
        safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    with atomic_write(folder / CONFIG_NAME) as path:
        path.write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    return folder


def load_model_folder(folder: Path) -> ScoreModel:
    """ScoreModel from config.json and model.safetensors."""
    config = _read_config(folder / CONFIG_NAME)
    weights = folder / WEIGHTS_NAME
    try:
        state = safetensors.torch.load_file(weights)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{weights} does not exist; {folder} is not a complete model folder"
        ) from error
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {weights} ({error}); is the file complete?") from error
    sigmas = state.get("sigmas")
    if sigmas is None or sigmas.shape != (config.n_sigmas,):
        found = "no sigmas" if sigmas is None else f"sigmas of shape {tuple(sigmas.shape)}"
        raise CheckpointError(
            f"{folder}: {CONFIG_NAME} says n_sigmas={config.n_sigmas}, "
            f"but {WEIGHTS_NAME} has {found}"
        )
    state = {
        key: value.float() if value.is_floating_point() else value for key, value in state.items()
    }
    return fill_model(_build(config, str(folder)), state, str(weights))


def _read_config(path: Path) -> ModelConfig:
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("expected a JSON object")
        return ModelConfig.from_dict(values)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot use {path}: {error}") from error


def _build(config: ModelConfig, where: str) -> ScoreModel:
    try:
        return ScoreModel(config)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{where}: {error}") from error


@dataclasses.dataclass(frozen=True)
class RunCheckpoint:
    """One training checkpoint as read from disk."""

    path: Path
    step: int
    contents: dict[str, Any]


def checkpoint_paths(run: Path) -> list[Path]:
    """Checkpoints of a run folder, oldest first."""
    return sorted((run / CHECKPOINTS).glob("step_*.pt"))


def is_run(folder: Path) -> bool:
    return bool(checkpoint_paths(folder))


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
    contents = read_torch(paths[-1])
    required = ("step", "model", "ema", "optimizer", "generator", "model_config", "train_config")
    if not isinstance(contents, dict) or any(key not in contents for key in required):
        raise CheckpointError(f"{paths[-1]} is not a checkpoint of ncsn_fast.train")
    return RunCheckpoint(paths[-1], contents["step"], contents)


def load_run(run: Path, weights: Literal["ema", "raw"] = "ema") -> ScoreModel:
    """The model of a run's newest checkpoint."""
    checkpoint = read_run(run)
    config = ModelConfig.from_dict(json.loads(checkpoint.contents["model_config"]))
    state = checkpoint.contents["ema"] if weights == "ema" else None
    return fill_model(
        _build(config, str(run)),
        checkpoint.contents["model"] if state is None else state,
        str(checkpoint.path),
    )


def load(
    source: str | Path | ScoreModel, *, weights: Literal["ema", "raw"] = "ema", **overrides: Any
) -> ScoreModel:
    """A ScoreModel in evaluation mode, on the CPU, in float32.

    Args:
        source: a run folder, a model folder (config.json + model.safetensors), an authors' .pth
            file, or a ScoreModel, which is returned as it is.
        weights: "ema" takes the averaged weights where there are any, "raw" the others (runs and
            .pth files).
        overrides: fields of ModelConfig that a .pth file does not hold (image_size, epsilon,
            sigma_begin, ...).

    Raises:
        CheckpointError: unreadable, unsafe, incomplete or foreign files. No code in a file is ever
            run.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights must be 'ema' or 'raw'; got {weights!r}")
    if isinstance(source, ScoreModel):
        return source
    path = Path(source).expanduser()
    if path.is_file():
        from ncsn_fast.published import (
            load_published,
        )  # the .pth formats, a reader of this file's functions

        return load_published(path, weights=weights, overrides=overrides)
    if overrides:
        raise CheckpointError(
            f"{path} carries its own configuration; overrides are for .pth files only"
        )
    if not path.is_dir():
        raise CheckpointError(
            f"{path} does not exist; a model is a run folder, a model folder or a .pth file"
        )
    if is_run(path):
        return load_run(path, weights)
    if (path / CONFIG_NAME).exists():
        return load_model_folder(path)
    raise CheckpointError(
        f"{path} is neither a run (no {CHECKPOINTS}/step_*.pt) "
        f"nor a model folder (no {CONFIG_NAME})"
    )

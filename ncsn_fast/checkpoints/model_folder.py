"""Reading and writing models: model folders, run folders, and the authors' published .pth files.

Nothing here unpickles code: every torch.load has weights_only=True.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn_fast.data.files import atomic_write
from ncsn_fast.diffusion.schedule import check_ladder
from ncsn_fast.models.score import ModelConfig, ScoreModel

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CHECKPOINTS = "checkpoints"
_EXACT = ("sigmas", ".W")

Weights = Literal["ema", "raw"]


class CheckpointError(ValueError):
    """A file that cannot be used as a model; the message says why and what to do."""


def read_torch(path: Path) -> Any:
    """torch.load without code execution, on the CPU; CheckpointError for whatever goes wrong."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about odd pickles: refused or fine
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors (or is no checkpoint), and reading it could run code: "
            "refused. Re-save its state dicts with torch.save."
        ) from error
    except Exception as error:  # damaged bytes make the reader raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"cannot read {path} as a torch checkpoint ({reason}); is the file complete?"
        ) from error


def check_tensors(entry: Any, where: str) -> dict[str, Tensor]:
    """`entry` if it is a state dict of plain dense tensors, else CheckpointError."""
    if not isinstance(entry, dict) or not entry:
        raise CheckpointError(f"{where} is not a state dict of tensors")
    for key, value in entry.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{where} is not a state dict of tensors: see its entry {key!r}")
        dense = value.layout == torch.strided and value.device.type == "cpu"
        # A view that repeats few numbers would make a small file ask for any amount of memory.
        if not dense or value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise CheckpointError(f"{where}: {key} is not a plain dense tensor; re-save the file")
    return entry


def build_model(config: ModelConfig, state: dict[str, Tensor], where: str) -> ScoreModel:
    """The model of `config` with these weights, in evaluation mode, float32, on the CPU.

    Nothing is allocated before every key and shape is known to fit.

    Raises:
        CheckpointError: missing or unexpected keys, wrong shapes or types, NaN, a bad ladder.
    """
    try:
        with torch.device("meta"):
            model = ScoreModel(config)
        model.net.check_input(torch.empty(1, *model.image_shape, device="meta"))
        expected = model.state_dict()
        _check_fit(expected, state, config.arch)
        _check_ends(config, check_ladder(state["sigmas"]))
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    ready = {key: value.to(expected[key].dtype).contiguous() for key, value in state.items()}
    model.load_state_dict(ready, assign=True)
    return model.eval()


def _check_fit(expected: dict[str, Tensor], state: dict[str, Tensor], arch: str) -> None:
    missing, extra = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or extra:
        kinds = (("missing", missing), ("unexpected", extra))
        parts = "; ".join(f"{kind} {_some(keys)}" for kind, keys in kinds if keys)
        raise ValueError(f"the weights do not fit network {arch!r}: {parts}")
    for key, value in state.items():
        wanted = expected[key]
        if value.shape != wanted.shape:
            raise ValueError(
                f"{key} has shape {tuple(value.shape)}; expected {tuple(wanted.shape)}"
            )
        if value.is_floating_point() != wanted.is_floating_point() or value.is_complex():
            raise ValueError(f"{key} has type {value.dtype}; expected {wanted.dtype}")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{key} holds NaN or infinite values; use another checkpoint")


def _check_ends(config: ModelConfig, ladder: NDArray[np.float64]) -> None:
    ends = (config.sigma_begin, config.sigma_end)
    if not np.allclose(ends, ladder[[0, -1]], rtol=1e-3):
        raise ValueError(
            f"the weights' sigmas go from {ladder[0]:g} to {ladder[-1]:g}; "
            f"{CONFIG_NAME} says {ends[0]:g} to {ends[1]:g}"
        )


def _some(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def save_model(model: ScoreModel, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Writes a model folder: config.json and model.safetensors.

    Args:
        dtype: type of the stored weights (None: as they are). Loading gives float32 whatever it is.
            Sigmas and the frequencies of Fourier features (large phases) stay as they are.
    """
    folder = Path(folder)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    if dtype is not None:
        state = {
            k: v.to(dtype) if v.is_floating_point() and not k.endswith(_EXACT) else v
            for k, v in state.items()
        }
    with atomic_write(folder / WEIGHTS_NAME) as path:
        path.write_bytes(safetensors.torch.save(state, metadata={"format": "pt"}))
    with atomic_write(folder / CONFIG_NAME) as path:
        path.write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    return folder


def load_model_folder(folder: Path) -> ScoreModel:
    """ScoreModel from config.json and model.safetensors."""
    weights, described = folder / WEIGHTS_NAME, folder / CONFIG_NAME
    try:
        text = described.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {described}: {error}") from error
    try:
        state = safetensors.torch.load_file(weights)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{weights} does not exist; {folder} is not a complete model folder"
        ) from error
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot read {weights} ({error}); is the file complete?") from error
    return build_model(_config(text, state, str(described)), state, str(weights))


def _config(text: str, state: dict[str, Tensor], where: str) -> ModelConfig:
    """ModelConfig from JSON, for weights that must have as many sigmas as it says."""
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("expected a JSON object")
        sigmas = state.get("sigmas")
        found = "no sigmas" if sigmas is None else f"sigmas of shape {tuple(sigmas.shape)}"
        if sigmas is None or list(sigmas.shape) != [values.get("n_sigmas")]:
            raise ValueError(f"n_sigmas is {values.get('n_sigmas')}, but the weights have {found}")
        return ModelConfig.from_dict(values)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot use {where}: {error}") from error


@dataclasses.dataclass(frozen=True)
class RunCheckpoint:
    """One training checkpoint as read from disk; `contents` is Trainer.state_dict()."""

    path: Path
    step: int
    model_config: ModelConfig
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
        "generator": Tensor, "model_config": str, "train_config": str,
    }  # fmt: skip
    if not isinstance(contents, dict) or not all(
        isinstance(contents.get(key, ...), kind) for key, kind in kinds.items()
    ):
        raise CheckpointError(f"{path} is not a checkpoint of ncsn_fast.train")
    for name in ("model", "ema"):
        if contents[name] is not None:
            check_tensors(contents[name], f"{path}: its {name} entry")
    config = _config(contents["model_config"], contents["model"], str(path))
    try:
        settings = json.loads(contents["train_config"])
    except ValueError as error:
        raise CheckpointError(f"cannot use {path}: {error}") from error
    return RunCheckpoint(path, contents["step"], config, settings, contents)

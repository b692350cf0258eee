"""Model folders: config.json and model.safetensors, and fast_table.json of a tuned model."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ncsn_fast.checkpoints import diffusers_unet, hub
from ncsn_fast.checkpoints.safetensors_file import read_safetensors
from ncsn_fast.checkpoints.torch_file import CheckpointError, key_differences
from ncsn_fast.data.files import atomic_write, atomic_write_all
from ncsn_fast.data.json_file import JSONError, parse_json, read_json
from ncsn_fast.diffusion.spacing import check_ladder
from ncsn_fast.models.adapter import WrappedConfig, identity_of
from ncsn_fast.models.score import ModelConfig, ScoreModel, config_from_dict
from ncsn_fast.models.shapes import shapes_only
from ncsn_fast.models.tuned_table import TunedTable
from ncsn_fast.models.unet_config import UNetConfig
from ncsn_fast.models.wrap import check_runs, wrap, wrapped

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
TABLE_NAME = hub.TABLE_NAME
DIGEST = "weights_sha256"  # in config.json: of which weights it speaks
_EXACT = ("sigmas", ".W", ".freqs")  # endings of vectors that keep float32 in half precision


def build_model(
    config: ModelConfig | UNetConfig, state: dict[str, Tensor], where: str
) -> ScoreModel:
    """The model of `config` with these weights, in evaluation mode, float32, on the CPU.

    Nothing is allocated before every key and shape is known to fit.

    Raises:
        CheckpointError: missing or unexpected keys, wrong shapes or types, NaN, a bad ladder.
    """
    try:
        with shapes_only():
            model = ScoreModel(config)
        expected = model.state_dict()
        check_fit(expected, state, config.arch)
        _check_ends(config, check_ladder(state["sigmas"]))
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    ready = {key: value.to(expected[key].dtype).contiguous() for key, value in state.items()}
    model.load_state_dict(ready, assign=True)
    return model.eval()


def check_fit(expected: dict[str, Tensor], state: dict[str, Tensor], arch: str) -> None:
    """Raises ValueError unless the weights have the expected keys, shapes, kinds and no NaN."""
    if differences := key_differences(expected, state):
        raise ValueError(f"the weights do not fit network {arch!r}: {differences}")
    for key, wanted in expected.items():
        value = state[key]
        if value.shape != wanted.shape:
            raise ValueError(
                f"{key} has shape {tuple(value.shape)}; expected {tuple(wanted.shape)}"
            )
        if value.is_floating_point() != wanted.is_floating_point() or value.is_complex():
            raise ValueError(f"{key} has type {value.dtype}; expected {wanted.dtype}")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{key} holds NaN or infinite values; use another checkpoint")


def _check_ends(
    config: ModelConfig | UNetConfig | WrappedConfig, ladder: NDArray[np.float64]
) -> None:
    ends = (config.sigma_begin, config.sigma_end)
    if not np.allclose(ends, ladder[[0, -1]], rtol=1e-3):
        raise ValueError(
            f"the weights' sigmas go from {ladder[0]:g} to {ladder[-1]:g}; "
            f"{CONFIG_NAME} says {ends[0]:g} to {ends[1]:g}"
        )


def save_model(model: ScoreModel, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Writes a model folder: config.json and model.safetensors, and the table of a tuned model.

    A table that is there, of the model that the folder held before, does not stay.

    Args:
        dtype: type of the stored weights (None: as they are). Loading gives float32 whatever it is.
            Sigmas and the frequencies of Fourier features (large phases) stay as they are.

    Raises:
        TypeError: of a subclass of ScoreModel, which loading would not restore.
    """
    if type(model) is not ScoreModel:
        raise TypeError(
            f"a model folder holds a ScoreModel, and loading it would leave out what "
            f"{type(model).__name__} adds; save its state_dict() with torch.save"
        )
    folder = Path(folder)
    values = model.config.to_dict()  # TypeError before anything is written
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    if dtype is not None:
        exact = {k for k, v in state.items() if v.ndim == 1 and k.endswith(_EXACT)}
        state = {
            k: v.to(dtype) if v.is_floating_point() and k not in exact else v
            for k, v in state.items()
        }
    content = safetensors.torch.save(state, metadata={"format": "pt"})
    described = {**values, DIGEST: hashlib.sha256(content).hexdigest()}
    (folder / TABLE_NAME).unlink(missing_ok=True)
    with atomic_write_all(folder / WEIGHTS_NAME, folder / CONFIG_NAME) as (weights, config):
        weights.write_bytes(content)
        config.write_text(json.dumps(described, indent=2) + "\n")
    if model.tuned is not None:
        save_table(model.tuned, folder)
    return folder


def save_table(table: TunedTable, folder: Path) -> Path:
    """Writes the table of method "fast" that was fitted to a folder's model."""
    path = folder / TABLE_NAME
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(table.to_dict()) + "\n")
    return path


def read_table(model: ScoreModel, folder: Path) -> TunedTable | None:
    """Returns the table of a folder's model, or None if the folder has none.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    path = folder / TABLE_NAME
    try:
        table = TunedTable.from_dict(read_json(path))
        table.check_fits(model.image_shape, model.sigmas.double().numpy())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot use {path}: {error}. Delete it (method fast then runs its default table), or "
            "tune again"
        ) from error
    return table


def load_model_folder(folder: Path, net: nn.Module | None = None) -> ScoreModel:
    """ScoreModel from config.json and model.safetensors.

    Args:
        net: the network of a model that was wrapped; its weights are replaced by those of the file.

    Raises:
        CheckpointError: the files are not complete, or do not belong together, or belong to another
            network, or to one that is missing.
    """
    weights, described = folder / WEIGHTS_NAME, folder / CONFIG_NAME
    try:
        values = read_json(described)
    except (OSError, JSONError) as error:
        raise CheckpointError(str(error)) from error
    if not weights.exists() and "snapshot_every" in values:
        raise CheckpointError(
            f"{folder} is a run that has saved no checkpoint yet: it saves every "
            f"{values['snapshot_every']} steps (--snapshot-every), and when Ctrl-C or "
            "--max-minutes stops it"
        )
    if not weights.exists():
        raise CheckpointError(f"{weights} does not exist; {folder} is not a complete model folder")
    expected = values.pop(DIGEST, None)
    state, digest = read_safetensors(weights)
    if "parameterisation" in values and "network" not in values:
        model = _wrapped(values, state, net, described, weights)
    elif net is None:
        model = build_model(_config(values, state, str(described)), state, str(weights))
    else:
        raise CheckpointError(f"{folder} holds a network of this package; load it without net=")
    if expected not in (None, digest):
        raise CheckpointError(
            f"{described} is not of the weights in {weights}, whose SHA-256 is {digest}: writing "
            f"the folder was interrupted, or one file was exchanged. Write it again (or delete "
            f"{DIGEST} from {CONFIG_NAME}, if both are as you want them)"
        )
    model.tuned = read_table(model, folder)
    return model


def _wrapped(
    values: dict[str, Any],
    state: dict[str, Tensor],
    net: nn.Module | None,
    described: Path,
    weights: Path,
) -> ScoreModel:
    """Puts the weights of a wrapped model into its network.

    The caller brings that, or it is built from the configuration of diffusers.
    """
    try:
        identity = "" if net is None else identity_of(net)
        if net is None and isinstance(settings := values.get("diffusers"), dict):
            net = diffusers_unet.build(settings, len(state)).to_empty(device="cpu")
            identity = diffusers_unet.identity(settings)
        config = WrappedConfig.from_dict(values, identity)
    except (ValueError, TypeError, KeyError, OverflowError, ImportError) as error:
        raise CheckpointError(f"cannot use {described}: {error}") from error
    if net is None:
        raise CheckpointError(
            f"{described.parent} holds weights of a network that is not of this package "
            f"({config.arch}), and files run no code: build that network and pass it, "
            "load(folder, net=...)"
        )
    try:
        model = wrapped(net, config, state["sigmas"])
        expected = model.state_dict()
        check_fit(expected, state, type(net).__name__)
        _check_ends(config, check_ladder(state["sigmas"]))
    except (ValueError, RuntimeError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{weights}: {error}") from error
    model.load_state_dict(state)
    return check_runs(model)


def config_from_json(text: str, state: dict[str, Tensor], where: str) -> ModelConfig | UNetConfig:
    """A network's description from JSON, for weights that have as many sigmas as it says."""
    try:
        values = parse_json(text, where)
    except JSONError as error:
        raise CheckpointError(str(error)) from error
    return _config(values, state, where)


def _config(
    values: dict[str, Any], state: dict[str, Tensor], where: str
) -> ModelConfig | UNetConfig:
    sigmas = state.get("sigmas")
    found = "no sigmas" if sigmas is None else f"sigmas of shape {tuple(sigmas.shape)}"
    try:
        if sigmas is None or list(sigmas.shape) != [values.get("n_sigmas")]:
            raise ValueError(f"n_sigmas is {values.get('n_sigmas')}, but the weights have {found}")
        return config_from_dict(values)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointError(f"cannot use {where}: {error}") from error


class _ModelFolders:
    """The storage behind ScoreModel.save_pretrained, from_pretrained and push_to_hub."""

    save = staticmethod(save_model)

    @staticmethod
    def load(source: str | Path) -> ScoreModel:
        """Reads a model folder, here or on the Hub."""
        folder = hub.fetch(source) if hub.is_name(source) else Path(source).expanduser()
        return load_model_folder(folder)

    @staticmethod
    def push(model: ScoreModel, repo_id: str, **options: Any) -> str:
        """Uploads a model folder, and returns its address."""
        with tempfile.TemporaryDirectory() as folder:
            return hub.push(save_model(model, folder), repo_id, **options)


ScoreModel.storage = _ModelFolders()

__all__ = [
    "CONFIG_NAME",
    "TABLE_NAME",
    "WEIGHTS_NAME",
    "ModelConfig",
    "ScoreModel",
    "build_model",
    "config_from_json",
    "load_model_folder",
    "read_table",
    "save_model",
    "save_table",
    "wrap",
]

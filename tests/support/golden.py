"""Golden vectors, and the weights and inputs that they were computed from."""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from paths import TESTS
from torch import Tensor

from ncsn_fast import ModelConfig, ScoreModel

FOLDER = TESTS / "golden"
ARCHS = {
    "NCSNv2": "ncsnv2",
    "NCSNv2Deeper": "ncsnv2_deeper",
    "NCSNv2Deepest": "ncsnv2_deepest",
    "NCSN": "ncsn",
    "NCSNdeeper": "ncsn_deeper",
}
TOLERANCE = 1e-5  # relative to max |output|


def read(name: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Reads metadata and arrays of a golden file."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files if key != "meta"}
        return json.loads(str(file["meta"])), arrays


def uniform(seed: int, *shape: int) -> Tensor:
    """Generates inputs by the golden files' recipe."""
    return torch.from_numpy(np.random.RandomState(seed).rand(*shape).astype(np.float32))


def weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """Generates a weight by the golden files' recipe, reproducible from the key alone."""
    seed = zlib.crc32(key.encode())
    z = np.random.RandomState(seed).standard_normal(shape)
    if key.endswith(("alpha", "gamma")):
        z = 1 + 0.1 * z
    elif key.endswith("embed.weight"):
        z = 0.1 * z
        z[:, : 2 * shape[1] // 3] += 1
    elif len(shape) == 4:
        z = z / np.sqrt(np.prod(shape[1:]))
    else:
        z = 0.1 * z
    return torch.from_numpy(np.asarray(z, dtype=np.float32))


def model(meta: dict[str, Any]) -> ScoreModel:
    """Returns the network of a golden file, with its weights."""
    config = ModelConfig(
        arch=ARCHS[meta.get("model") or meta["network"]],
        image_size=(meta["image_size"], meta["image_size"]),
        channels=meta["channels"],
        ngf=meta["ngf"],
        n_sigmas=meta["num_scales"],
        sigma_begin=meta["sigma_begin"],
        sigma_end=meta["sigma_end"],
        epsilon=meta.get("step_lr", 1e-5),
        n_steps_each=meta.get("n_steps_each", 1),
    )
    built = ScoreModel(config)
    state = {key: weight(key, tuple(value.shape)) for key, value in built.net.state_dict().items()}
    for key in ("begin_conv.weight", "begin_conv.bias"):
        state[key] = state[key] * meta.get("begin_conv_scale", 1.0)
    built.net.load_state_dict(state)
    return built.eval()


def assert_matches(actual: Tensor, expected: NDArray[Any]) -> None:
    """Raises unless the error is within TOLERANCE of max |expected|."""
    assert tuple(actual.shape) == expected.shape
    error = np.abs(actual.double().numpy() - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"largest error {error:.2e} of max |output|; allowed {TOLERANCE:.0e}"

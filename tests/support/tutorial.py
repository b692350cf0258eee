"""Networks of the tutorials at their published sizes, with the weights of the golden files."""

import dataclasses
import functools
import math
import zlib

import numpy as np
import torch

from ncsn_fast import ModelConfig, ScoreModel
from ncsn_fast.models.architectures import TIME_STYLE

A = ModelConfig(
    arch="unet_a", image_size=(28, 28), channels=1, ngf=32, n_sigmas=99, sigma_begin=22.0,
    sigma_min=0.01, sigma_max=22.0, **TIME_STYLE,
)  # fmt: skip
B = dataclasses.replace(
    A, arch="unet_b", n_sigmas=88, sigma_begin=9.84521456, sigma_min=1.0, sigma_max=25.0
)
CONFIG = {"unet_a": A, "unet_b": B, "unet_c": dataclasses.replace(B, arch="unet_c")}


def weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Generates a weight of these networks by the golden files' recipe."""
    z = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith(".W"):
        z = 2 * z
    elif len(shape) == 1 and key.endswith(".weight"):
        z = 1 + 0.1 * z
    elif len(shape) > 1:
        z = z / math.sqrt(math.prod(shape[1:]))
    else:
        z = 0.1 * z
    return torch.from_numpy(np.asarray(z, dtype=np.float32))


@functools.cache
def published(arch: str) -> ScoreModel:
    """Returns the network at its published size, with the golden files' weights."""
    model = ScoreModel(CONFIG[arch])
    state = {key: weight(key, tuple(v.shape)) for key, v in model.net.state_dict().items()}
    model.net.load_state_dict(state)
    return model.eval()

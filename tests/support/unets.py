"""U-Nets of score_sde and EDM: the golden files' weights, and a tiny model of every kind."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ncsn_fast import ScoreModel
from ncsn_fast.models.score_unet import ScoreUNet
from ncsn_fast.models.unet_architectures import (
    DDPMConfig,
    DDPMppConfig,
    DhariwalUNetConfig,
    NCSNppConfig,
    SongUNetConfig,
    UNetSettings,
)
from ncsn_fast.models.unet_config import UNetConfig, preconditioned

_SMALL: dict[str, Any] = {
    "image_size": 8, "num_channels": 1, "nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1,
    "attn_resolutions": (4,), "dropout": 0.0,
}  # fmt: skip
_EDM: dict[str, Any] = {
    "img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8,
    "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,), "dropout": 0.0,
}  # fmt: skip
_SKIPS: dict[str, Any] = {"progressive": "output_skip", "progressive_input": "input_skip"}

# Network and preconditioning of a tiny model.
TINY: dict[str, tuple[UNetSettings, str]] = {
    "ncsnpp": (NCSNppConfig(**_SMALL), "ve"),
    "ncsnpp-skip": (NCSNppConfig(**_SMALL, **_SKIPS), "ve"),
    "ncsnpp-discrete": (NCSNppConfig(**_SMALL, embedding_type="positional"), "discrete_ve"),
    "ncsnpp-vp": (NCSNppConfig(**_SMALL, embedding_type="positional", centered=True), "sub_vp"),
    "ddpmpp": (DDPMppConfig(**_SMALL), "vp"),
    "ddpm": (DDPMConfig(**{**_SMALL, "nf": 32, "ch_mult": (1, 1)}), "discrete_vp"),
    "edm-ddpmpp": (SongUNetConfig(**_EDM, label_dim=3), "EDMPrecond"),
    "edm-ddpmpp-vp": (SongUNetConfig(**_EDM), "VPPrecond"),
    "edm-ncsnpp": (SongUNetConfig.ncsnpp(**_EDM, augment_dim=9), "VEPrecond"),
    "edm-adm": (
        DhariwalUNetConfig(**{**_EDM, "model_channels": 32, "label_dim": 3}), "EDMPrecond"
    ),
    "edm-iddpm": (
        DhariwalUNetConfig(**{**_EDM, "model_channels": 16, "out_channels": 2}), "iDDPMPrecond"
    ),
}  # fmt: skip


def config(name: str, n: int = 12) -> UNetConfig:
    """Returns the description of a tiny model; score_sde's have n levels."""
    network, kind = TINY[name]
    return preconditioned(network, kind, n=1000 if kind == "discrete_vp" else n)


def model(name: str, n: int = 12) -> ScoreModel:
    """Returns a tiny model whose weights are drawn by the golden files' rule."""
    built = ScoreModel(config(name, n))
    draw_weights(built.net, "model." if name.startswith("edm") else "")
    return built.eval()


def draw_weights(net: nn.Module, prefix: str = "") -> None:
    """Draws weights by the golden files' rule, from their keys, which begin with a prefix."""
    state = net.state_dict()
    net.load_state_dict({
        key: value if key.endswith("resample_filter") else _weight(prefix + key, value)
        for key, value in state.items()
    })  # fmt: skip


def _weight(key: str, like: Tensor) -> Tensor:
    shape, name = tuple(like.shape), key.rsplit(".", 1)[-1]
    z = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if len(shape) == 1:
        z = 2 * z if name in ("W", "freqs") else 1 + 0.1 * z if name == "weight" else 0.1 * z
    else:
        z = z / math.sqrt(shape[0] if name == "W" else math.prod(shape[1:]))
    return torch.from_numpy(np.asarray(z, dtype=np.float32))


def network_of(net: nn.Module) -> ScoreUNet:
    """Returns a model's network."""
    assert isinstance(net, ScoreUNet)
    return net

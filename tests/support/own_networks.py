"""Networks as users bring them, for `ncsn_fast.wrap`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ncsn_fast
from ncsn_fast import ScoreModel
from ncsn_fast.diffusion.parameterisation import DiscreteVP


class Block(nn.Module):
    """Residual block with group norm, SiLU and a time embedding added in between."""

    def __init__(self, cin: int, cout: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, cin), nn.GroupNorm(4, cout)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.time = nn.Linear(width, 2 * cout)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return (h + self.skip(x)) / math.sqrt(2)


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int = 2) -> None:
        super().__init__()
        self.norm, self.heads = nn.GroupNorm(4, channels), heads
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, 3, self.heads, -1, h * w).unbind(1)
        weights = torch.einsum("nhci,nhcj->nhij", q, k / math.sqrt(c // self.heads)).softmax(-1)
        return x + self.out(torch.einsum("nhij,nhcj->nhci", weights, v).reshape(n, c, h, w))


class UNet(nn.Module):
    """A U-Net written as a user would: down by strides, up by nearest, skips concatenated."""

    def __init__(self, channels: int = 1, width: int = 8, n_classes: int = 0) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 32))
        self.classes = nn.Embedding(n_classes + 1, 32) if n_classes else None
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.down1, self.down2 = Block(width, width, 32), Block(width, 2 * width, 32)
        self.shrink = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.attention = Attention(2 * width)
        self.up2, self.up1 = Block(4 * width, width, 32), Block(3 * width, width, 32)
        self.leave = nn.Sequential(
            nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)
        )

    def forward(self, x: Tensor, log_sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        frequencies = torch.exp(torch.linspace(0, 3, self.width // 2, device=x.device))
        phase = log_sigma[:, None] * frequencies
        embedding = self.embed(torch.cat([phase.sin(), phase.cos()], dim=1))
        if self.classes is not None and labels is not None:
            embedding = embedding + self.classes(labels)
        embedding = F.silu(embedding)
        h1 = self.down1(self.enter(x), embedding)
        h2 = self.attention(self.down2(self.shrink(h1), embedding))
        h = F.avg_pool2d(h1, 2)
        h = self.up2(torch.cat([h2, self.down2(h, embedding)], dim=1), embedding)
        h = F.interpolate(h, scale_factor=2, mode="nearest")
        return self.leave(self.up1(torch.cat([h, h1, self.enter(x)], dim=1), embedding))


class Points(nn.Module):
    """A multilayer perceptron on points in the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.layers(torch.cat([x, sigma.log()[:, None]], dim=1))


class Signal(nn.Module):
    """A convolutional network of signals (N, 2, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(2, 8, 5, padding=2), nn.GELU(), nn.Conv1d(8, 2, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def diffusers_unet() -> nn.Module:
    """Returns a small UNet2DModel with attention, of the package diffusers."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


_LADDER: dict[str, Any] = {"n_sigmas": 6, "n_steps_each": 1}
_ENDS: dict[str, Any] = {"sigma_min": 0.05, "sigma_max": 5.0}
_EPSILON: dict[str, Any] = {"predicts": "epsilon", **_LADDER}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "diffusers": (
        diffusers_unet,
        {"sees": "timestep", "process": DiscreteVP(), "image_shape": (1, 16, 16),
         "data_range": (-1, 1), **_EPSILON},
    ),
    "unet": (
        UNet, {"sees": "log_sigma", "image_shape": (1, 8, 12), **_EPSILON, **_ENDS},
    ),
    "edm": (
        lambda: UNet(3), {"predicts": "edm", "image_shape": (3, 8, 8), "data_range": (-1, 1),
                          **_LADDER},
    ),
    "classes": (
        lambda: UNet(n_classes=3),
        {"sees": "log_sigma", "image_shape": (1, 8, 8), "n_classes": 3, **_EPSILON, **_ENDS},
    ),
    "points": (
        Points, {"sees": "sigma", "image_shape": (2,), "data_range": None, **_EPSILON, **_ENDS},
    ),
    "signals": (
        Signal, {"image_shape": (2, 16), "data_range": None, **_EPSILON, **_ENDS},
    ),
}  # fmt: skip


def model(name: str) -> ScoreModel:
    """Returns a wrapped model with random weights."""
    make, options = CASES[name]
    torch.manual_seed(3)
    return ncsn_fast.wrap(make(), **options)

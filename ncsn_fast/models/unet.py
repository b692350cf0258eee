"""U-Net of the score-SDE tutorials, conditioned on the time t, in their public versions.

Noise grows with t in (0, 1]: x(t) = x(0) + std(t) z. The raw output is f = std(t) * score; the
caller divides by std(t), the last step of the tutorial's network (models/score.py).
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncsn_fast.models.architectures import VERSIONS, check_unet_size
from ncsn_fast.models.normalisation import normalise


class Clock:
    """Mapping between time t and noise level std(t), in both directions.

    With k = log(sigma_max / sigma_min):
        std(t)^2 = sigma_min^2 (e^(2kt) - 1)            version a, equal to sigma(t)^2 - sigma_min^2
        std(t)^2 = sigma_min^2 (e^(2kt) - 1) / (2k)     b and c, the integral of sigma(s)^2
    """

    def __init__(self, version: str, sigma_min: float, sigma_max: float) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(
                f"expected 0 < sigma_min < sigma_max; "
                f"got sigma_min={sigma_min}, sigma_max={sigma_max}"
            )
        self.rate = 2 * math.log(sigma_max / sigma_min)
        self.scale = sigma_min
        if VERSIONS[version].diffusion_is_sigma:
            self.scale /= math.sqrt(self.rate)
        self.t_min = VERSIONS[version].t_min

    def std(self, t: Tensor | float) -> Tensor:
        """Computes the standard deviation of the noise at times t; shape of t, float64."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return self.scale * torch.expm1(self.rate * t).sqrt()

    def time(self, std: Tensor | float) -> Tensor:
        """Computes the time in [0, 1] at which the noise has this standard deviation; float64.

        Above std(1) it returns 1, the last time the network was trained on.
        """
        std = torch.as_tensor(std, dtype=torch.float64)
        return (torch.log1p((std / self.scale).square()) / self.rate).clamp(max=1.0)


class FourierFeatures(nn.Module):
    """Features [sin 2 pi t W, cos 2 pi t W] (N, 2 width), fixed random frequencies W (width,)."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(width) * scale, requires_grad=False)

    def forward(self, t: Tensor) -> Tensor:
        # Phases reach hundreds of radians: always float32, in the published order of operations.
        phase = t.float()[:, None] * self.W.float() * 2 * math.pi
        features = torch.cat((phase.sin(), phase.cos()), dim=1)
        return features.to(torch.promote_types(self.W.dtype, torch.float32))


class Dense(nn.Module):
    """Linear layer from the time embedding to a bias of feature maps: (N, cout, 1, 1)."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.dense = nn.Linear(cin, cout)

    def forward(self, e: Tensor) -> Tensor:
        return self.dense(e)[:, :, None, None]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Stage of the U-Net: swish(norm(convolution(x) + dense(time))), 3x3, without padding and bias.

    Widths are in units of ngf. `skip` is the width of the encoder maps at the end of the input, or
    added to it (Version.adds_skips); `up` is a transposed convolution; a group norm has at most
    `groups` groups.
    """

    conv: str
    dense: str
    norm: str
    cin: int
    cout: int
    stride: int = 2
    skip: int = 0
    up: bool = False
    output_padding: int = 0
    groups: int = 32


ENCODER = (
    Stage("conv1", "dense1", "gnorm1", 0, 1, stride=1, groups=4),  # from the image's channels
    Stage("conv2", "dense2", "gnorm2", 1, 2),
    Stage("conv3", "dense3", "gnorm3", 2, 4),
    Stage("conv4", "dense4", "gnorm4", 4, 8),
)
DECODER = (
    Stage("tconv4", "dense5", "tgnorm4", 8, 4, up=True),
    Stage("tconv3", "dense6", "tgnorm3", 4, 2, skip=4, up=True, output_padding=1),
    Stage("tconv2", "dense7", "tgnorm2", 2, 1, skip=2, up=True, output_padding=1),
)


class TimeUNet(nn.Module):
    """U-Net of the tutorials; attribute names match the keys of their checkpoints.

    Args:
        version: a key of VERSIONS.
        channels: image channels.
        ngf: width of the first stage, 32 as published; the time embedding has width 8 ngf.
    """

    scale_input = False  # takes data in [0, 1] unscaled

    def __init__(self, version: str, *, channels: int = 1, ngf: int = 32) -> None:
        super().__init__()
        if version not in VERSIONS:
            raise ValueError(f"version must be one of {', '.join(VERSIONS)}; got {version!r}")
        if min(channels, ngf) < 1:
            raise ValueError(f"channels and ngf must be positive; got {channels} and {ngf}")
        self.channels, width = channels, 8 * ngf
        self.adds_skips = VERSIONS[version].adds_skips
        features = FourierFeatures(width // 2, VERSIONS[version].fourier_scale)
        self.embed: nn.Module = features
        if VERSIONS[version].linear:
            self.embed = nn.Sequential(features, nn.Linear(width, width))
        for stage in (*ENCODER, *DECODER):
            cin = stage.cin if self.adds_skips else stage.cin + stage.skip
            cin, cout = cin * ngf or channels, stage.cout * ngf
            self.add_module(stage.conv, _convolution(stage, cin, cout))
            self.add_module(stage.dense, Dense(width, cout))
            self.add_module(stage.norm, nn.GroupNorm(math.gcd(stage.groups, cout), cout))
        self.tconv1 = nn.ConvTranspose2d(ngf if self.adds_skips else 2 * ngf, channels, 3)

    def check_input(self, x: Tensor) -> None:
        """Raises ValueError unless x is (N, channels, H, W) with an admissible H and W."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"expected images (N, {self.channels}, H, W); got {tuple(x.shape)}")
        check_unet_size(x.shape[2], x.shape[3])

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Computes f(x, t) = std(t) * score, shape of x, for `t` (N,) float in (0, 1]."""
        self.check_input(x)
        if t is None:
            raise ValueError(
                "this network is conditioned on the time: pass t (N,), or use "
                "ScoreModel.score(x, sigma)"
            )
        if t.shape != x.shape[:1] or not t.is_floating_point():
            raise ValueError(f"t must be ({len(x)},) float; got {tuple(t.shape)} {t.dtype}")
        embedding = F.silu(self.embed(t))
        h, skips = x, []
        for stage in ENCODER:
            h = self._run(stage, h, embedding)
            skips.append(h)
        skips.pop()
        for stage in DECODER:
            h, skip = self._run(stage, h, embedding), skips.pop()
            h = h + skip if self.adds_skips else torch.cat((h, skip), dim=1)
        return self.tconv1(h)

    def _run(self, stage: Stage, x: Tensor, embedding: Tensor) -> Tensor:
        conv, dense, norm = map(self.get_submodule, (stage.conv, stage.dense, stage.norm))
        h, bias = conv(x), dense(embedding)
        return normalise(norm, h, activation="silu", add=bias.flatten(1))


def _convolution(stage: Stage, cin: int, cout: int) -> nn.Module:
    if not stage.up:
        return nn.Conv2d(cin, cout, 3, stage.stride, bias=False)
    return nn.ConvTranspose2d(
        cin, cout, 3, stage.stride, output_padding=stage.output_padding, bias=False
    )

"""Building blocks of the U-Nets of score_sde and EDM: resampling, residual blocks, attention.

What a block computes is in a Style (unet_table.py). Names of parameters are those of the
published checkpoints.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncsn_fast.models.normalisation import normalise
from ncsn_fast.models.unet_table import Resampling, Style


class _Filtered(nn.Module):
    """Module that halves or doubles height and width with a separable filter f, channel by channel.

    The kernel is R = f f^T / (sum f)^2 (n, n), with padding (n - 1) // 2. Halving is R at every
    second pixel, and doubling its transpose times 4. For f = (1, 1) these are the mean of each 2x2
    square, and its repetition.
    """

    resample_filter: Tensor

    def add_filter(self, direction: Resampling, style: Style) -> None:
        self.direction, self.square = direction, style.filter == (1.0, 1.0)
        if direction:
            # The device is given: a network may be built on meta, and its constants stay there.
            f = torch.tensor(style.filter, dtype=torch.float32, device="cpu")
            kernel = (f.outer(f) / f.sum().square())[None, None]
            self.register_buffer("resample_filter", kernel, persistent=style.keep_filter)

    def kernel(self, x: Tensor) -> Tensor:
        """Returns R (C, 1, n, n) for x (N, C, H, W)."""
        return self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)

    def resample(self, x: Tensor) -> Tensor:
        if not self.direction:
            return x
        if self.square and self.direction == "down":
            return F.avg_pool2d(x, 2)
        if self.square:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        kernel, groups = self.kernel(x), x.shape[1]
        padding = (kernel.shape[-1] - 1) // 2
        if self.direction == "down":
            return F.conv2d(x, kernel, stride=2, padding=padding, groups=groups)
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=groups)


class Resample(_Filtered):
    """Halves or doubles height and width."""

    def __init__(self, direction: Resampling, style: Style) -> None:
        super().__init__()
        self.add_filter(direction, style)

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


class ResampledConv(nn.Conv2d, _Filtered):
    """Convolution of odd size that keeps height and width, after resampling."""

    def __init__(self, cin: int, cout: int, size: int, direction: Resampling, style: Style) -> None:
        super().__init__(cin, cout, size, padding=size // 2)
        self.add_filter(direction, style)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.resample(x))


class FilteredConv(nn.Conv2d, _Filtered):
    """3x3 convolution and filter R in one: height and width are halved once.

    EDM convolves first, with more padding; score_sde filters first. Both are one convolution with a
    kernel of n + 2, so the order is free, and this one has a quarter of the multiplications.
    """

    def __init__(self, cin: int, cout: int, style: Style) -> None:
        super().__init__(cin, cout, 3, stride=2)
        self.add_filter("down", style)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel(x)
        padding = (kernel.shape[-1] - 1) // 2 + 1
        return super().forward(F.conv2d(x, kernel, padding=padding, groups=x.shape[1]))


class StridedConv(nn.Conv2d):
    """DDPM's change of the resolution: a 3x3 convolution, of every second pixel or of doubled ones.

    Halving pads a row below and a column on the right, and nothing above and on the left.
    """

    def __init__(self, channels: int, direction: Resampling) -> None:
        down = direction == "down"
        super().__init__(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)
        self.direction = direction

    def forward(self, x: Tensor) -> Tensor:
        if self.direction == "down":
            return super().forward(F.pad(x, (0, 1, 0, 1)))
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class NIN(nn.Module):
    """Linear map of each pixel's channels, y = W^T x + b, with W (cin, cout)."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(cin, cout))
        self.b = nn.Parameter(torch.zeros(cout))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.W.t()[:, :, None, None], self.b)


def group_norm(channels: int, style: Style) -> nn.GroupNorm:
    """Returns the group norm of a style."""
    return nn.GroupNorm(style.groups(channels), channels, eps=style.eps)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Computes softmax(q^T k / sqrt(d)) v over all pixels of maps (N, C, H, W), heads d wide."""
    tokens = (x.unflatten(1, (heads, -1)).flatten(3).transpose(2, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(*tokens).transpose(2, 3).reshape(q.shape)


class Attention(nn.Module):
    """Attention block of score_sde, with one head: scale (x + NIN_3(attention(norm(x))))."""

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()
        self.scale = style.scale
        self.GroupNorm_0 = group_norm(channels, style)
        for i in range(4):
            self.add_module(f"NIN_{i}", NIN(channels, channels))

    def last_weights(self) -> list[Tensor]:
        """Returns the weights of its last layer."""
        return [self.get_parameter("NIN_3.W")]

    def forward(self, x: Tensor) -> Tensor:
        h = normalise(self.GroupNorm_0, x)
        q, k, v, out = (self.get_submodule(f"NIN_{i}") for i in range(4))
        return _scaled(x + out(attend(q(h), k(h), v(h), 1)), self.scale)


class Block(nn.Module):
    """Residual block; see Style.

    With `heads`, attention follows, of EDM's kind, whose parameters are the block's own.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        embedding: int,
        style: Style,
        *,
        direction: Resampling = "",
        heads: int = 0,
    ) -> None:
        super().__init__()
        self.style, self.heads = style, heads
        norm0, conv0, affine, norm1, conv1, skip = style.names
        self.add_module(norm0, group_norm(cin, style))
        self.add_module(conv0, ResampledConv(cin, cout, 3, direction, style))
        self.add_module(affine, nn.Linear(embedding, cout * (2 if style.adaptive else 1)))
        self.add_module(norm1, group_norm(cout, style))
        self.add_module(conv1, nn.Conv2d(cout, cout, 3, padding=1))
        self.skips = cin != cout or bool(direction)
        if self.skips:
            self.add_module(skip, _shortcut(cin, cout, direction, style))
        if heads:
            self.norm2 = group_norm(cout, style)
            self.qkv = nn.Conv2d(cout, 3 * cout, 1)
            self.proj = nn.Conv2d(cout, cout, 1)

    def last_weights(self) -> list[Tensor]:
        """Returns the weights of the last layers of its branches."""
        last = self.get_parameter(f"{self.style.names[4]}.weight")
        return [last, self.proj.weight] if self.heads else [last]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Computes the block for x (N, cin, H, W) and act(embedding of the noise level) (N, E)."""
        norm0, conv0, affine, norm1, conv1 = map(self.get_submodule, self.style.names[:5])
        a = affine(embedding)
        h = conv0(normalise(norm0, x, activation="silu"))
        if self.style.adaptive:
            scale, shift = a.chunk(2, dim=1)
            h = normalise(norm1, h, activation="silu", scale=scale, shift=shift)
        else:
            h = normalise(norm1, h, activation="silu", add=a)
        h = conv1(F.dropout(h, self.style.dropout, self.training))
        skip = self.get_submodule(self.style.names[5])(x) if self.skips else x
        x = _scaled(h + skip, self.style.scale)
        return self._attended(x) if self.heads else x

    def _attended(self, x: Tensor) -> Tensor:
        # Rows of qkv are q, k, v of the first channel, then of the second, ...
        weight, bias = (
            self.get_parameter(f"qkv.{name}").unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
            for name in ("weight", "bias")
        )
        q, k, v = F.conv2d(normalise(self.norm2, x), weight, bias).chunk(3, dim=1)
        return _scaled(self.proj(attend(q, k, v, self.heads)) + x, self.style.scale)


def _shortcut(cin: int, cout: int, direction: Resampling, style: Style) -> nn.Module:
    if style.matrix_skip:
        return NIN(cin, cout)
    if cin == cout and not style.always_skip:
        return Resample(direction, style)
    return ResampledConv(cin, cout, 1, direction, style)


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale


class Positional(nn.Module):
    """Features of c: sines and cosines of c 10000^(-k / n) for k = 0 .. width / 2 - 1.

    n is width / 2 - 1 with `endpoint`, else width / 2; the cosines come first with `cos_first`.
    """

    frequencies: Tensor

    def __init__(self, width: int, *, endpoint: bool, cos_first: bool) -> None:
        super().__init__()
        self.cos_first = cos_first
        half = width // 2
        k = torch.arange(half, dtype=torch.float32, device="cpu")
        frequencies = torch.exp(k * (-math.log(10000) / (half - endpoint)))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, c: Tensor) -> Tensor:
        phase = c.float()[:, None] * self.frequencies.float()
        both = (phase.cos(), phase.sin()) if self.cos_first else (phase.sin(), phase.cos())
        return torch.cat(both, dim=1)


class Fourier(nn.Module):
    """Features [sin 2 pi c W, cos 2 pi c W] of c, with fixed random frequencies W.

    Phases reach hundreds of radians, so they are computed in float32, whatever the network's type,
    and in the published order. W is a parameter, `W`, as in score_sde, or a buffer, `freqs`, as in
    EDM.
    """

    def __init__(self, width: int, scale: float, *, buffer: bool) -> None:
        super().__init__()
        frequencies = torch.randn(width // 2) * scale
        self.name = "freqs" if buffer else "W"
        if buffer:
            self.register_buffer(self.name, frequencies)
        else:
            self.W = nn.Parameter(frequencies, requires_grad=False)

    def forward(self, c: Tensor) -> Tensor:
        frequencies = getattr(self, self.name).float()
        if self.name == "freqs":
            phase = c.float()[:, None] * (2 * math.pi * frequencies)
        else:
            phase = c.float()[:, None] * frequencies * 2 * math.pi
        return torch.cat((phase.sin(), phase.cos()), dim=1)

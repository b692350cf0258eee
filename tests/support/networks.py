"""Networks as users write them, for the tests of lowering: no module of this package."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Residual block of a DDPM: GroupNorm, SiLU, convolution, time embedding, skip."""

    def __init__(self, cin: int, cout: int, time: int, *, film: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(min(4, cin), cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.time = nn.Linear(time, 2 * cout if film else cout)
        self.norm2 = nn.GroupNorm(min(4, cout), cout)
        self.drop = nn.Dropout(0.1)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        self.film = film

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.film:
            scale, shift = self.time(F.silu(e))[:, :, None, None].chunk(2, dim=1)
            h = F.silu(self.norm2(h) * (1 + scale) + shift)
        else:
            h = h + self.time(F.silu(e))[:, :, None, None]
            h = F.silu(self.norm2(h))
        return (self.skip(x) + self.conv2(self.drop(h))) / math.sqrt(2)


class Attention(nn.Module):
    """Self-attention of pixels; `explicit` without scaled_dot_product_attention."""

    def __init__(self, channels: int, heads: int, *, explicit: bool = False) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.heads, self.explicit = heads, explicit

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (
            part.reshape(n, h * w, self.heads, c // self.heads).transpose(1, 2)
            for part in self.qkv(tokens).chunk(3, dim=-1)
        )
        if self.explicit:
            weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(c // self.heads), dim=-1)
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        y = self.out(y.transpose(1, 2).reshape(n, h * w, c))
        return x + y.transpose(1, 2).reshape(n, c, h, w)


class UNet(nn.Module):
    """U-Net net(x, c) with GroupNorm, SiLU, attention, time embedding and concatenated skips.

    down: "conv" (stride 2), "pad" (zeros behind, then stride 2) or "pool".
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 16,
        *,
        down: str = "conv",
        film: bool = False,
        explicit: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.down = width, down
        time = 4 * width
        self.embed = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.block1 = Residual(width, width, time, film=film)
        self.shrink = (
            nn.AvgPool2d(2)
            if down == "pool"
            else nn.Conv2d(width, width, 3, stride=2, padding=int(down == "conv"))
        )
        self.block2 = Residual(width, 2 * width, time, film=film)
        self.attention = Attention(2 * width, 2, explicit=explicit)
        self.block3 = Residual(2 * width, 2 * width, time, film=film)
        self.grow = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.block4 = Residual(4 * width, width, time, film=film)
        self.norm = nn.GroupNorm(4, width)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        rates = torch.exp(torch.arange(self.width // 2, device=x.device) * (-1 / self.width))
        phase = c[:, None] * rates[None]
        e = self.embed(torch.cat((phase.sin(), phase.cos()), dim=1))
        h1 = self.first(x)
        h2 = self.block1(h1, e)
        h = self.shrink(F.pad(h2, (0, 1, 0, 1)) if self.down == "pad" else h2)
        h = self.block3(self.attention(self.block2(h, e)), e)
        h = self.grow(F.interpolate(h, scale_factor=2, mode="nearest"))
        h = self.block4(torch.cat((h, h1, h2), dim=1), e)
        return self.last(F.silu(self.norm(h)))


class Odd(nn.Module):
    """A chain of operations, most of which no kernel of ours covers."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.wide = nn.Conv2d(8, 8, (1, 3), padding=(0, 1))
        self.squeeze = nn.Linear(8, 8)
        self.position = nn.Parameter(torch.randn(1, 8, 8, 8))
        self.gain = nn.Parameter(torch.tensor([1.5]))
        self.prelu = nn.PReLU()
        self.norm = nn.LayerNorm(8)
        self.up = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1)
        self.last = nn.Conv2d(8, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.mish(self.wide(F.relu(self.grouped(x - 0.5), inplace=True)))
        gate = torch.sigmoid(self.squeeze(h.mean(dim=(2, 3))))
        h = h * gate[:, :, None, None] + self.position
        h = self.prelu(h) * self.gain
        a, b = h.chunk(2, dim=1)
        h = torch.cat((torch.tanh(a) * b, b.flip(3)), dim=1)
        tokens = self.norm(h.flatten(2).transpose(1, 2))
        n = x.shape[0]
        h = tokens.transpose(1, 2).reshape(n, 8, 8, 8)
        h = F.mish(h).view(n, 4, 2, 8, 8).flip(1).view(n, 8, 8, 8)
        h = F.interpolate(self.up(h), size=(16, 16), mode="bilinear", align_corners=False)
        return F.hardtanh(self.last(h)) + F.pad(x[:, :, 1:, :-1], (0, 1, 1, 0))


class Masked(nn.Module):
    """A network that writes where a mask says, whose size the host has to know."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).clone()
        h[h > 0.1] = 0.1
        return self.last(h)

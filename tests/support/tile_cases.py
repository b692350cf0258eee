"""Maps and weights for the tests of convolutions in tiles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsn_fast.ops import reference

# N, in channels, out channels, height, width, taps, dilation.
SHAPES = {
    "whole tiles": (2, 32, 64, 4, 16, 3, 1),
    "two tiles a row": (1, 64, 32, 3, 32, 3, 1),
    "tiles that wrap": (2, 32, 40, 8, 8, 3, 1),
    "one tile and a part": (1, 32, 32, 5, 20, 3, 1),
    "prime sizes": (2, 37, 41, 13, 7, 3, 1),
    "dilation 2, odd sizes": (2, 19, 35, 11, 14, 3, 2),
    "dilation 4": (1, 48, 40, 16, 16, 3, 4),
    "dilation beyond the map": (2, 17, 9, 3, 2, 3, 5),
    "many blocks": (2, 96, 32, 33, 40, 3, 1),
    "one pixel": (3, 16, 32, 1, 1, 3, 1),
    "one row": (1, 5, 3, 1, 21, 3, 1),
    "one column": (1, 7, 1, 18, 1, 3, 2),
    "one channel": (2, 1, 1, 6, 5, 3, 1),
    "1x1": (2, 64, 48, 8, 16, 1, 1),
    "1x1, prime sizes": (3, 37, 33, 7, 5, 1, 3),
    "no samples": (0, 16, 16, 8, 8, 3, 1),
}


def noise_like(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nhwc(x: Tensor) -> Tensor:
    n, c, height, width = x.shape
    return torch.empty(n, height, width, c, dtype=x.dtype).permute(0, 3, 1, 2).copy_(x)


def case(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """ELU outputs off zero, uneven weights in bfloat16, a bias, and a map to add."""
    n, inputs, outputs, height, width, taps, dilation = SHAPES[name]
    x = nhwc((F.elu(noise_like(n, inputs, height, width)) + 0.4).bfloat16())
    weight = noise_like(outputs, inputs, taps, taps, seed=1) / (taps * taps * inputs) ** 0.5
    weight = (weight * torch.linspace(0.1, 3.0, outputs)[:, None, None, None]).bfloat16()
    bias = noise_like(outputs, seed=2) - 0.7
    added = nhwc((noise_like(n, outputs, height, width, seed=3) + 0.3).bfloat16())
    return x, weight, bias, added, dilation


def empty(x: Tensor, channels: int) -> Tensor:
    return nhwc(torch.full((len(x), channels, *x.shape[2:]), torch.nan, dtype=torch.bfloat16))


def relative(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item() if exact.numel() else 0.0


def excess(
    total: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    *,
    dilation: int = 1,
) -> float:
    """Returns by how much an element of a convolution in tiles is off beyond what it may.

    Products of bfloat16s are exact in float32. Roundings follow one another: of the 16 products of
    a tile, of the sum of two such, of the chunks and taps, of the bias and of what is added; the
    last one is to bfloat16.
    """
    args = [None if t is None else t.double() for t in (x, weight.bfloat16(), bias, added)]
    exact = reference.tile_conv(*args, dilation=dilation)
    sizes = [None if t is None else t.abs() for t in args]
    chunks, taps = -(-x.shape[1] // 32), weight.shape[2] ** 2
    once, last = 2.0**-24, 2.0**-8  # of float32, and of bfloat16
    allowed = (19 + chunks * taps) * once * reference.tile_conv(*sizes, dilation=dilation)
    allowed = last * exact.abs() + (1 + last) * allowed
    off = (total.double() - exact).abs() - allowed
    return float(off.max()) if off.numel() else 0.0

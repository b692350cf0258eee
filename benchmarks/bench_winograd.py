"""Benchmarks of our convolutions against oneDNN's, on the CIFAR-10 network's 3x3 convolutions.

`kernel` is Winograd's; `tiles` those of AMX, which other processors report as not run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
import torch.nn.functional as F
from bench_ops import BOUNDS, DTYPES, SECONDS, Builders, Case
from convolutions import check_dtype
from providers import check_amx
from race import Absent
from torch import Tensor

from ncsn_fast.ops import cpu, reference, tiles

# N, input channels, output channels, height and width, dilation.
SHAPES = {
    "8x128x32x32": (8, 128, 128, 32, 1),
    "8x256x16x16": (8, 256, 256, 16, 1),
    "8x256x16x16, dilation 4": (8, 256, 256, 16, 4),
    "8x256x16x16 to 128": (8, 256, 128, 16, 1),
    "1x256x16x16": (1, 256, 256, 16, 1),
    "32x256x16x16": (32, 256, 256, 16, 1),
}


@pytest.mark.parametrize("provider", ["torch", "kernel", "tiles"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_winograd(race: Callable[..., None], shape: str, dtype: str, provider: str) -> None:
    """Times channels-last convolutions with weights packed in advance, as in an engine."""

    def builders(settings: Any) -> Builders:
        n, in_channels, out_channels, size, dilation = SHAPES[shape]
        generator = torch.Generator().manual_seed(0)
        x = F.elu(torch.randn(n, in_channels, size, size, generator=generator))
        x = x.to(DTYPES[dtype]).to(memory_format=torch.channels_last)
        weight = torch.randn(out_channels, in_channels, 3, 3, generator=generator)
        weight /= (9 * in_channels) ** 0.5
        out = x.new_empty(n, out_channels, size, size).to(memory_format=torch.channels_last)
        weights = cpu.winograd_pack(weight, x.dtype)
        runs = {
            "torch": _direct(x, weight.to(x.dtype), dilation),
            "kernel": lambda: cpu.winograd_conv_out(x, weights, None, out, dilation=dilation),
            "tiles": _in_tiles(x, weight, out, dilation),
        }
        expected = reference.winograd_conv(x.double(), weight.double(), None, dilation=dilation)
        info = {"dtype": dtype, "batch": n, "flop": 2 * out.numel() * 9 * in_channels}
        return Case(runs, expected, info, BOUNDS[dtype]).builders(settings.names)

    race(builders, f"3x3 convolution, {dtype}, {shape}", seconds=SECONDS)


def _direct(x: Tensor, weight: Tensor, dilation: int) -> Callable[[], Tensor]:
    each, one = [dilation, dilation], [1, 1]
    mkldnn = torch.ops.mkldnn
    try:
        check_dtype(x.dtype)
    except Absent as error:
        return functools.partial(_raise, error)
    packed = mkldnn._reorder_convolution_weight(weight, each, one, each, 1, list(x.shape))
    return lambda: mkldnn._convolution_pointwise(
        x, packed, None, each, one, each, 1, "none", [], ""
    )


def _in_tiles(x: Tensor, weight: Tensor, out: Tensor, dilation: int) -> Callable[[], Tensor]:
    try:
        if x.dtype is not torch.bfloat16:
            raise Absent("tiles multiply bfloat16 maps")
        check_amx()
    except Absent as error:
        return functools.partial(_raise, error)
    packed = tiles.tile_pack(weight)

    def run() -> Tensor:
        tiles.tile_conv_out(x, packed, total=out, dilation=dilation)
        return out

    return run


def _raise(error: Exception) -> NoReturn:
    raise error

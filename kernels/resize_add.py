"""Bilinear resize of a channels-last map with aligned corners, alone or added to another map.

    y[i, j] = a[i, j] + x at (i (h - 1) / (H - 1), j (w - 1) / (W - 1))

Positions are computed in integers, so a position that falls on a pixel of x takes exactly that
pixel. A Triton instance computes some columns of one row of y. Memory traffic per element of y in
bfloat16: 4 bytes with a, 2 without, plus x once from memory and four times from cache.
Memory-bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ncsn_fast.kernels import launch
from ncsn_fast.kernels.launch import cdiv, power_of_2
from torch import Tensor

TILE_ELEMENTS, TILE_CHANNELS = 1024, 256
MOST_PIXELS = 32768  # per side, so that the product of two positions fits an int32
WARPS = 4


@triton.jit
def source_of(position, in_size, out_size):
    """Returns (low, high, weight): the input position is (1 - weight) low + weight high."""
    span = tl.maximum(out_size - 1, 1)
    at = position * (in_size - 1)
    low, rest = at // span, at % span
    weight = tl.div_rn(rest.to(tl.float32), span.to(tl.float32))
    return low, tl.where(rest == 0, low, low + 1), weight


@triton.jit
def between(low, high, weight):
    """Interpolates linearly between low and high."""
    return tl.fma(high - low, weight, low)


@triton.jit
def resize_add_kernel(x_ptr, a_ptr, y_ptr, in_height, in_width, height, width, C: tl.constexpr,
                      BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Computes a block of one output row."""
    column_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    cols = (pid % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    pid //= column_blocks
    first = pid % tl.cdiv(width, BLOCK_W) * BLOCK_W
    pid //= tl.cdiv(width, BLOCK_W)
    sample, row = (pid // height).to(tl.int64), pid % height
    column = tl.arange(0, BLOCK_W)[:, None]
    inside = (first + column < width) & (cols < C)
    low_row, high_row, down = source_of(row, in_height, height)
    left, right, along = source_of(first + column, in_width, width)
    x_ptr += sample * in_height * in_width * C
    above = x_ptr + low_row.to(tl.int64) * in_width * C
    below = x_ptr + high_row.to(tl.int64) * in_width * C
    left, right = left * C + cols, right * C + cols
    x00 = tl.load(above + left, mask=inside, other=0.0).to(tl.float32)
    x10 = tl.load(below + left, mask=inside, other=0.0).to(tl.float32)
    x01 = tl.load(above + right, mask=inside, other=0.0).to(tl.float32)
    x11 = tl.load(below + right, mask=inside, other=0.0).to(tl.float32)
    y = between(between(x00, x10, down), between(x01, x11, down), along)
    to = ((sample * height + row) * width + first) * C + (column * C + cols)
    if a_ptr is not None:
        y += tl.load(a_ptr + to, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + to, y.to(y_ptr.dtype.element_ty), mask=inside)


def resize_add(
    x: Tensor, size: tuple[int, int], a: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Computes `reference.resize_add` of channels-last maps; out may be a, not x."""
    launch.check_maps(x=x)
    n, c, in_height, in_width = x.shape
    shape = (n, c, *size)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    launch.check_maps(shape, out=out, a=a)
    if out.numel() == 0:
        return out
    if max(in_height, in_width, *size) > MOST_PIXELS:
        raise ValueError(f"sides must be at most {MOST_PIXELS}; got {tuple(x.shape)} to {shape}")
    if x.numel() == 0:
        raise ValueError(f"x of shape {tuple(x.shape)} has no pixels to resize to {shape}")
    height, width = size
    block_c = min(power_of_2(c), TILE_CHANNELS)
    block_w = min(power_of_2(width), TILE_ELEMENTS // block_c)
    programs = n * height * cdiv(width, block_w) * cdiv(c, block_c)
    launch.start(
        resize_add_kernel, programs, x.device, x, a, out, in_height, in_width, height, width, C=c,
        BLOCK_W=block_w, BLOCK_C=block_c, warps=WARPS,
    )  # fmt: skip
    return out

"""5x5 pools, stride 1, padding 2, of channels-last maps.

    max: the largest of the elements inside the map; a NaN among them gives a NaN
    average: sum / 25; elements outside the map count as zeros

A Triton instance computes STRIP rows of some columns and channels. It reduces each input row along
the
width once, with five loads, and uses the result for up to five output rows: 10 loads per output
element instead of 25, served by the L1 cache. Memory traffic: each element is read once and written
once, 4 bytes in bfloat16. Memory-bound, then bound by the L1 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ncsn_fast.kernels import launch
from ncsn_fast.kernels.launch import LINE, cdiv, power_of_2
from torch import Tensor

STRIP = 4
TILE_ELEMENTS = 1024
WARPS = 4


@triton.jit
def pooled(u, v, MAX: tl.constexpr):
    """Combines two values by maximum or sum."""
    if MAX:
        return tl.maximum(u, v, propagate_nan=tl.PropagateNan.ALL)
    return u + v


@triton.jit
def pooled_row(x_ptr, row, first, cols, height, width, C: tl.constexpr, BLOCK_W: tl.constexpr,
               MAX: tl.constexpr):  # fmt: skip
    """Reduces one input row along the width, at columns first .. first + BLOCK_W - 1."""
    outside: tl.constexpr = float("-inf") if MAX else 0.0
    result = tl.full((BLOCK_W, cols.shape[0]), outside, tl.float32)
    for shift in tl.static_range(-2, 3):
        at = first + shift + tl.arange(0, BLOCK_W)[:, None]
        inside = (at >= 0) & (at < width) & (cols < C)[None, :] & (row >= 0) & (row < height)
        pointers = x_ptr + (row.to(tl.int64) * width + first + shift) * C
        pointers += tl.arange(0, BLOCK_W)[:, None] * C + cols[None, :]
        value = tl.load(pointers, mask=inside, other=outside).to(tl.float32)
        result = pooled(result, value, MAX)
    return result


@triton.jit
def pool5_kernel(x_ptr, y_ptr, height, width, C: tl.constexpr, STRIP: tl.constexpr,
                 BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, MAX: tl.constexpr):  # fmt: skip
    """Computes STRIP output rows of a block of columns and channels."""
    column_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    cols = pid % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    pid //= column_blocks
    first = pid % tl.cdiv(width, BLOCK_W) * BLOCK_W
    pid //= tl.cdiv(width, BLOCK_W)
    top = pid % tl.cdiv(height, STRIP) * STRIP
    base = (pid // tl.cdiv(height, STRIP)).to(tl.int64) * height * width * C
    x_ptr += base
    # The last five reduced rows, oldest first; each new row completes an output row.
    r0 = pooled_row(x_ptr, top - 2, first, cols, height, width, C, BLOCK_W, MAX)
    r1 = pooled_row(x_ptr, top - 1, first, cols, height, width, C, BLOCK_W, MAX)
    r2 = pooled_row(x_ptr, top, first, cols, height, width, C, BLOCK_W, MAX)
    r3 = pooled_row(x_ptr, top + 1, first, cols, height, width, C, BLOCK_W, MAX)
    for i in tl.range(0, STRIP, loop_unroll_factor=1):  # unrolled, max pools in 16 bits spill
        row = top + i
        r4 = pooled_row(x_ptr, row + 2, first, cols, height, width, C, BLOCK_W, MAX)
        result = pooled(pooled(pooled(r0, r1, MAX), pooled(r2, r3, MAX), MAX), r4, MAX)
        if not MAX:
            result *= 0.04
        column = tl.arange(0, BLOCK_W)[:, None]
        inside = (first + column < width) & (cols < C)[None, :] & (row < height)
        to = y_ptr + base + (row.to(tl.int64) * width + first) * C + column * C + cols[None, :]
        tl.store(to, result.to(y_ptr.dtype.element_ty), mask=inside)
        r0, r1, r2, r3 = r1, r2, r3, r4


def _pool(x: Tensor, out: Tensor | None, maximum: bool) -> Tensor:
    out = torch.empty_like(x) if out is None else out
    launch.check_maps(x=x, out=out)
    if x.dtype != out.dtype or x.data_ptr() == out.data_ptr() != 0:
        raise ValueError(f"out must be another map than x, in {x.dtype}; got {out.dtype}")
    n, c, height, width = x.shape
    if x.numel() == 0:
        return out
    block_c = min(power_of_2(c), LINE // x.element_size())
    block_w = min(power_of_2(width), TILE_ELEMENTS // block_c)
    programs = n * cdiv(height, STRIP) * cdiv(width, block_w) * cdiv(c, block_c)
    launch.start(
        pool5_kernel, programs, x.device, x, out, height, width, C=c, STRIP=STRIP, BLOCK_W=block_w,
        BLOCK_C=block_c, MAX=maximum, warps=WARPS,
    )  # fmt: skip
    return out


def max_pool5(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Computes `reference.max_pool5` of a channels-last map; out is not x."""
    return _pool(x, out, True)


def avg_pool5(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Computes `reference.avg_pool5` of a channels-last map; out is not x."""
    return _pool(x, out, False)

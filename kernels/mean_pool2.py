"""Mean of each 2x2 square of a channels-last map of even height and width, or of the sum of two.

    y = ((s00 + s01) + (s10 + s11)) / 4,   s = a or a + b

A Triton instance computes some columns of one row of y. Memory traffic per element of y in
bfloat16: 10 bytes, or 18 with b. Memory-bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ncsn_fast.kernels import launch
from ncsn_fast.kernels.launch import cdiv, power_of_2
from torch import Tensor

TILE_ELEMENTS, TILE_CHANNELS = 1024, 256
WARPS = 4


@triton.jit
def summed(a_ptr, b_ptr, at, inside):
    """Loads a, or a + b, in float32."""
    total = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if b_ptr is not None:
        total += tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def mean_pool2_kernel(a_ptr, b_ptr, y_ptr, width, C: tl.constexpr, BLOCK_W: tl.constexpr,
                      BLOCK_C: tl.constexpr):  # fmt: skip
    """Computes a block of one output row; rows of all samples are numbered consecutively.

    `width` is that of y.
    """
    column_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    cols = (pid % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    pid //= column_blocks
    first = pid % tl.cdiv(width, BLOCK_W) * BLOCK_W
    row = (pid // tl.cdiv(width, BLOCK_W)).to(tl.int64)
    column = tl.arange(0, BLOCK_W)[:, None]
    inside = (first + column < width) & (cols < C)
    above = (4 * row * width + 2 * first) * C + (2 * C * column + cols)
    below = above + (2 * C) * tl.cast(width, tl.int64)  # cast: the JIT makes a width of 1 constant
    s = summed(a_ptr, b_ptr, above, inside) + summed(a_ptr, b_ptr, above + C, inside)
    s += summed(a_ptr, b_ptr, below, inside) + summed(a_ptr, b_ptr, below + C, inside)
    to = (row * width + first) * C + (C * column + cols)
    tl.store(y_ptr + to, (s * 0.25).to(y_ptr.dtype.element_ty), mask=inside)


def mean_pool2(a: Tensor, b: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Computes `reference.mean_pool2` of channels-last maps of even size; out is neither map."""
    launch.check_maps(a=a, b=b)
    n, c, height, width = a.shape
    if height % 2 or width % 2:
        raise ValueError(f"a must have even height and width; got shape {tuple(a.shape)}")
    shape = (n, c, height // 2, width // 2)
    if out is None:
        out = torch.empty(shape, dtype=a.dtype, device=a.device, memory_format=torch.channels_last)
    launch.check_maps(shape, out=out)
    if out.numel() == 0:
        return out
    block_c = min(power_of_2(c), TILE_CHANNELS)
    block_w = min(power_of_2(width // 2), TILE_ELEMENTS // block_c)
    programs = n * (height // 2) * cdiv(width // 2, block_w) * cdiv(c, block_c)
    launch.start(
        mean_pool2_kernel, programs, a.device, a, b, out, width // 2, C=c, BLOCK_W=block_w,
        BLOCK_C=block_c, warps=WARPS,
    )  # fmt: skip
    return out

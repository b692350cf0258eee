"""Channel statistics of a map and the pass that applies them, for norms and their gradients.

    mu, var: mean and biased variance of a channel over its plane of P = H W pixels
    m, v: mean and unbiased variance of mu over all C channels of the sample

`statistics_kernel` reduces a tile of pixels to (mean, M2) of each channel: two-pass in registers,
merging the blocks of a tile one after another (Chan et al. 1979). `merged_tiles` merges the tiles
of a sample and `spread_of_means` the channels. Memory traffic per element: 2 bytes read in
bfloat16, 8 / ROWS written. Memory-bound.

Tiles depend on C, P and dtype, never on N: no bit of a sample depends on its batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from ncsn_fast.kernels.launch import LINE, cdiv, power_of_2, start
from ncsn_fast.kernels.maths import activate
from torch import Tensor

TILE_ELEMENTS = 8192  # held in registers: 32 per thread
MOST_TILES = 32  # every program that writes y reads the partials of all tiles
WARPS = 8


@triton.jit
def block_statistics(x, valid, count):
    """Returns mean and M2 of each column of x (P, C), over `count` valid rows."""
    mean = tl.sum(tl.where(valid, x, 0.0), axis=0) / count
    # Corrected by the mean residual: a constant column has exactly its value as mean and M2 = 0.
    rest = tl.where(valid, x - mean[None, :], 0.0)
    total = tl.sum(rest, axis=0)
    correction = total / count
    squares = tl.sum(rest * rest, axis=0) - total * correction
    return mean + correction, tl.maximum(squares, 0.0)


@triton.jit
def merge(mean, squares, count, mean_b, squares_b, count_b):
    """Merges the statistics of two sets (Chan et al. 1979), not both empty."""
    delta = mean_b - mean
    share = tl.div_rn(count_b, count + count_b)
    return mean + delta * share, squares + squares_b + delta * delta * (count * share)


@triton.jit
def sample_block(base, first, last, cols, C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Returns pointers to pixels first .. first + BLOCK_P - 1 (P, C), and their validity mask."""
    rows = tl.arange(0, BLOCK_P)[:, None]
    inside = (first + rows < last) & (cols < C)[None, :]
    return base + first.to(tl.int64) * C + (rows * C + cols[None, :]), inside


@triton.jit
def range_statistics(base, first, cols, plane, C: tl.constexpr, ROWS: tl.constexpr,
                     BLOCK_P: tl.constexpr):  # fmt: skip
    """Returns statistics of pixels first .. first + ROWS - 1, clipped, block by block."""
    last = tl.minimum(first + ROWS, plane)
    mean = tl.zeros(cols.shape, tl.float32)
    squares = tl.zeros(cols.shape, tl.float32)
    for at in range(0, ROWS, BLOCK_P):
        pointers, inside = sample_block(base, first + at, last, cols, C, BLOCK_P)
        x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        count = tl.maximum(tl.minimum(last - first - at, BLOCK_P), 0).to(tl.float32)
        done = tl.minimum(last - first, at).to(tl.float32)
        block_mean, block_squares = block_statistics(x, inside, tl.maximum(count, 1.0))
        mean, squares = merge(mean, squares, done, block_mean, block_squares, count)
    return mean, squares


@triton.jit
def spread(values, valid, count):
    """Returns mean and M2 of a vector, two scalars; see `block_statistics`."""
    mean = tl.sum(tl.where(valid, values, 0.0)) / count
    rest = tl.where(valid, values - mean, 0.0)
    total = tl.sum(rest)
    return mean + total / count, tl.maximum(tl.sum(rest * rest) - total * (total / count), 0.0)


@triton.jit
def statistics_kernel(x_ptr, partials_ptr, plane, tiles, C: tl.constexpr, ROWS: tl.constexpr,
                      BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Writes partials (N, tiles, 2, C): mean and M2 of each channel of each tile of ROWS pixels."""
    column_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    tile, sample = pid // column_blocks % tiles, pid // column_blocks // tiles
    cols = pid % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    base = x_ptr + sample.to(tl.int64) * plane * C
    mean, squares = range_statistics(base, tile * ROWS, cols, plane, C, ROWS, BLOCK_P)
    to = partials_ptr + (sample.to(tl.int64) * tiles + tile) * (2 * C) + cols
    tl.store(to, mean, mask=cols < C)
    tl.store(to + C, squares, mask=cols < C)


@triton.jit
def merged_tiles(partials_ptr, cols, plane, tiles, C: tl.constexpr, ROWS: tl.constexpr,
                 TILES: tl.constexpr):  # fmt: skip
    """Returns mean and biased variance of channels `cols` over the whole plane of one sample."""
    tile = tl.arange(0, TILES)[:, None]
    inside = (tile < tiles) & (cols < C)[None, :]
    pointers = partials_ptr + tile * (2 * C) + cols[None, :]
    means = tl.load(pointers, mask=inside, other=0.0)
    squares = tl.load(pointers + C, mask=inside, other=0.0)
    count = tl.where(inside, tl.minimum(plane - tile * ROWS, ROWS).to(tl.float32), 0.0)
    first = tl.load(partials_ptr + cols, mask=cols < C, other=0.0)
    away = tl.where(inside, means - first[None, :], 0.0)
    mean = first + tl.sum(away * count, axis=0) / plane
    away = tl.where(inside, means - mean[None, :], 0.0)
    return mean, tl.sum(squares + away * away * count, axis=0) / plane


@triton.jit
def biased(mean, bias_ptr, cols, inside):
    """Adds the bias to the channel means; variances do not change."""
    if bias_ptr is not None:
        mean += tl.load(bias_ptr + cols, mask=inside, other=0.0)
    return mean


@triton.jit
def spread_of_means(partials_ptr, bias_ptr, plane, tiles, eps, C: tl.constexpr, ROWS: tl.constexpr,
                    TILES: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Returns m and 1 / sqrt(v + eps) of one sample, over all C channels, CHUNK at a time."""
    m, squares = 0.0, 0.0
    for at in range(0, C, CHUNK):
        cols = at + tl.arange(0, CHUNK)
        count = tl.cast(tl.minimum(C - at, CHUNK), tl.float32)
        mean, _ = merged_tiles(partials_ptr, cols, plane, tiles, C, ROWS, TILES)
        mean = biased(mean, bias_ptr, cols, cols < C)
        chunk_mean, chunk_squares = spread(mean, cols < C, count)
        done = tl.cast(at, tl.float32)
        m, squares = merge(m, squares, done, chunk_mean, chunk_squares, count)
    return m, inverse_root(squares / (C - 1 if C > 1 else 1) + eps)


@triton.jit
def inverse_root(x):
    """Computes 1 / sqrt(x), both operations rounded to nearest."""
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def write(x_base, y_base, first, plane, cols, mean, scale, shift, C: tl.constexpr,
          ROWS: tl.constexpr, BLOCK_P: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """Writes y of pixels first .. first + ROWS - 1, clipped to the plane."""
    for at in range(0, ROWS, BLOCK_P):
        pointers, inside = sample_block(x_base, first + at, plane, cols, C, BLOCK_P)
        x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        # Centred first: scale * x + shift would cancel badly for a large mean.
        y = tl.fma(x - mean[None, :], scale[None, :], shift[None, :])
        y = activate(y, ACTIVATION, y_base.dtype.element_ty != tl.float32)
        pointers, inside = sample_block(y_base, first + at, plane, cols, C, BLOCK_P)
        tl.store(pointers, y.to(y_base.dtype.element_ty), mask=inside)


class Tiling(NamedTuple):
    """Split of a map's statistics into `tiles` of `rows` pixels, each in blocks."""

    rows: int
    tiles: int
    block_p: int
    block_c: int


def tiling(plane: int, channels: int, element_size: int) -> Tiling:
    """Returns the tiling for maps of `plane` pixels, independent of the number of samples."""
    block_c = min(power_of_2(channels), LINE // element_size)
    block_p = min(power_of_2(plane), TILE_ELEMENTS // block_c)
    blocks = cdiv(cdiv(plane, block_p), MOST_TILES)
    return Tiling(blocks * block_p, cdiv(plane, blocks * block_p), block_p, block_c)


def new_partials(x: Tensor) -> Tensor:
    """Allocates the workspace (N, tiles, 2, C) float32 of `instance_norm_plus`, uninitialised."""
    n, c, height, width = x.shape
    tiles = tiling(height * width, c, x.element_size()).tiles if x.numel() else 0
    return torch.empty((n, tiles, 2, c), dtype=torch.float32, device=x.device)


def launch_statistics(x: Tensor, partials: Tensor | None) -> tuple[Tensor, Tiling]:
    """Fills `partials` (allocated if None) with the statistics of x's tiles."""
    n, c, height, width = x.shape
    split = tiling(height * width, c, x.element_size())
    if partials is None:
        partials = new_partials(x)
    shape = (n, split.tiles, 2, c)
    if partials.shape != shape or partials.dtype != torch.float32 or not partials.is_contiguous():
        raise ValueError(
            f"partials must be float32, contiguous, of shape {shape}; got "
            f"{tuple(partials.shape)}, {partials.dtype}. Use new_partials(x)."
        )
    programs = n * split.tiles * cdiv(c, split.block_c)
    start(
        statistics_kernel, programs, x.device, x, partials, height * width, split.tiles, C=c,
        ROWS=split.rows, BLOCK_P=split.block_p, BLOCK_C=split.block_c, warps=WARPS,
    )  # fmt: skip
    return partials, split

"""Gradients of `instance_norm_plus` for training, with respect to x, alpha, gamma and beta.

With g the gradient of y (times the derivative of ELU), n = (x - mu) / sqrt(var + eps) and
u = (mu - m) / sqrt(v + eps) the standardised means, per sample and channel S = sum g, D = sum g n:

    d alpha = gamma u S,   d gamma = D + alpha u S,   d beta = S,   q = gamma alpha S
    d mu = (q - mean q - u sum(q u) / (C - 1)) / sqrt(v + eps)           over the channels
    d x = r (g - n D / P) + (d mu - r S) / P,   r = gamma / sqrt(var + eps)

Six launches: statistics of x; per sample, the values shared by its pixels; S and D of each tile;
per sample, their sums and the coefficients of d x; d x; the ordered sum over samples of the
gradients of shared parameters. Tiles are those of the statistics. x is read three times and the
gradient twice, d x is written once: 12 bytes per element in bfloat16. Memory-bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ncsn_fast.kernels import launch, norm_statistics
from ncsn_fast.kernels.instance_norm_plus import in_rows
from ncsn_fast.kernels.launch import cdiv, check_maps, power_of_2
from ncsn_fast.kernels.norm_statistics import (
    WARPS,
    inverse_root,
    launch_statistics,
    merged_tiles,
    sample_block,
    spread_of_means,
)
from torch import Tensor

SHARED_CHANNELS = 32  # channels per program that sums over samples


@triton.jit(do_not_specialize=["alpha_row", "gamma_row", "beta_row"])
def shared_kernel(partials_ptr, alpha_ptr, gamma_ptr, beta_ptr, moments_ptr, rstd_ptr, alpha_row,
                  gamma_row, beta_row, plane, tiles, eps, C: tl.constexpr, ROWS: tl.constexpr,
                  TILES: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Writes moments (N, 5, C) (mean, 1/std, u, scale and shift of y) and rstd (N,).

    rstd = 1 / sqrt(v + eps)
    """
    sample = tl.program_id(0).to(tl.int64)
    partials_ptr += sample * tiles * (2 * C)
    m, rstd_channels = spread_of_means(partials_ptr, None, plane, tiles, eps, C, ROWS, TILES, CHUNK)
    tl.store(rstd_ptr + sample, rstd_channels)
    for at in range(0, C, CHUNK):
        cols = at + tl.arange(0, CHUNK)
        inside = cols < C
        mean, variance = merged_tiles(partials_ptr, cols, plane, tiles, C, ROWS, TILES)
        rstd, u = inverse_root(variance + eps), (mean - m) * rstd_channels
        alpha = tl.load(alpha_ptr + sample * alpha_row + cols, mask=inside, other=0.0)
        gamma = tl.load(gamma_ptr + sample * gamma_row + cols, mask=inside, other=0.0)
        beta = tl.load(beta_ptr + sample * beta_row + cols, mask=inside, other=0.0)
        to = moments_ptr + sample * (5 * C) + cols
        tl.store(to, mean, mask=inside)
        tl.store(to + C, rstd, mask=inside)
        tl.store(to + 2 * C, u, mask=inside)
        tl.store(to + 3 * C, gamma * rstd, mask=inside)
        tl.store(to + 4 * C, gamma * alpha * u + beta, mask=inside)


@triton.jit
def centred_and_gradient(x_ptr, grad_ptr, moments_ptr, first, last, cols, C: tl.constexpr,
                         BLOCK_P: tl.constexpr, ELU: tl.constexpr):  # fmt: skip
    """Returns x - mu and the gradient of ELU's input, in float32."""
    pointers, inside = sample_block(x_ptr, first, last, cols, C, BLOCK_P)
    mean = tl.load(moments_ptr + cols, mask=cols < C, other=0.0)
    centred = tl.load(pointers, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
    pointers, _ = sample_block(grad_ptr, first, last, cols, C, BLOCK_P)
    grad = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    if ELU:
        scale = tl.load(moments_ptr + 3 * C + cols, mask=cols < C, other=0.0)
        shift = tl.load(moments_ptr + 4 * C + cols, mask=cols < C, other=0.0)
        y = tl.fma(centred, scale[None, :], shift[None, :])
        grad = tl.where(y > 0.0, grad, grad * tl.exp(y))
    return tl.where(inside, centred, 0.0), grad


@triton.jit
def reduce_kernel(x_ptr, grad_ptr, moments_ptr, sums_ptr, plane, tiles, C: tl.constexpr,
                  ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                  ELU: tl.constexpr):  # fmt: skip
    """Writes sums (N, tiles, 2, C): sum g and sum g (x - mu) of each tile."""
    column_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    tile, sample = pid // column_blocks % tiles, (pid // column_blocks // tiles).to(tl.int64)
    cols = pid % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += sample * plane * C
    grad_ptr += sample * plane * C
    moments_ptr += sample * (5 * C)
    total, dot = tl.zeros(cols.shape, tl.float32), tl.zeros(cols.shape, tl.float32)
    for at in range(0, ROWS, BLOCK_P):
        centred, grad = centred_and_gradient(
            x_ptr, grad_ptr, moments_ptr, tile * ROWS + at, plane, cols, C, BLOCK_P, ELU
        )
        total += tl.sum(grad, axis=0)
        dot += tl.sum(grad * centred, axis=0)
    to = sums_ptr + (sample * tiles + tile) * (2 * C) + cols
    tl.store(to, total, mask=cols < C)
    tl.store(to + C, dot, mask=cols < C)


@triton.jit
def summed_tiles(sums_ptr, rstd, cols, tiles, C: tl.constexpr, TILES: tl.constexpr):
    """Returns S and D of channels `cols` of one sample."""
    tile = tl.arange(0, TILES)[:, None]
    inside = (tile < tiles) & (cols < C)[None, :]
    pointers = sums_ptr + tile * (2 * C) + cols[None, :]
    total = tl.sum(tl.load(pointers, mask=inside, other=0.0), axis=0)
    return total, tl.sum(tl.load(pointers + C, mask=inside, other=0.0), axis=0) * rstd


@triton.jit(do_not_specialize=["alpha_row", "gamma_row"])
def coefficients_kernel(sums_ptr, moments_ptr, rstd_ptr, alpha_ptr, gamma_ptr, grads_ptr, out_ptr,
                        alpha_row, gamma_row, plane, tiles, C: tl.constexpr, TILES: tl.constexpr,
                        CHUNK: tl.constexpr):  # fmt: skip
    """Writes d alpha, d gamma, d beta (N, 3, C) and the coefficients of d x (N, 2, C).

    d x = r g + o0 (x - mu) + o1
    """
    sample = tl.program_id(0).to(tl.int64)
    sums_ptr += sample * tiles * (2 * C)
    moments_ptr += sample * (5 * C)
    q_sum, q_dot = 0.0, 0.0
    for at in range(0, C, CHUNK):
        cols = at + tl.arange(0, CHUNK)
        inside = cols < C
        alpha = tl.load(alpha_ptr + sample * alpha_row + cols, mask=inside, other=0.0)
        gamma = tl.load(gamma_ptr + sample * gamma_row + cols, mask=inside, other=0.0)
        rstd = tl.load(moments_ptr + C + cols, mask=inside, other=0.0)
        u = tl.load(moments_ptr + 2 * C + cols, mask=inside, other=0.0)
        total, dot = summed_tiles(sums_ptr, rstd, cols, tiles, C, TILES)
        to = grads_ptr + sample * (3 * C) + cols
        tl.store(to, gamma * u * total, mask=inside)
        tl.store(to + C, dot + alpha * u * total, mask=inside)
        tl.store(to + 2 * C, total, mask=inside)
        q_sum += tl.sum(gamma * alpha * total)
        q_dot += tl.sum(gamma * alpha * total * u)
    along = q_dot / (C - 1 if C > 1 else 1)
    rstd_channels = tl.load(rstd_ptr + sample)
    for at in range(0, C, CHUNK):
        cols = at + tl.arange(0, CHUNK)
        inside = cols < C
        alpha = tl.load(alpha_ptr + sample * alpha_row + cols, mask=inside, other=0.0)
        rstd = tl.load(moments_ptr + C + cols, mask=inside, other=0.0)
        u = tl.load(moments_ptr + 2 * C + cols, mask=inside, other=0.0)
        scale = tl.load(moments_ptr + 3 * C + cols, mask=inside, other=0.0)
        gamma = tl.load(gamma_ptr + sample * gamma_row + cols, mask=inside, other=0.0)
        total, dot = summed_tiles(sums_ptr, rstd, cols, tiles, C, TILES)
        d_mean = rstd_channels * (gamma * alpha * total - q_sum / C - u * along)
        to = out_ptr + sample * (2 * C) + cols
        tl.store(to, -(scale * dot * rstd) / plane, mask=inside)
        tl.store(to + C, (d_mean - scale * total) / plane, mask=inside)


@triton.jit
def grad_x_kernel(x_ptr, grad_ptr, moments_ptr, coefficients_ptr, out_ptr, plane, tiles,
                  C: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr,
                  BLOCK_C: tl.constexpr, ELU: tl.constexpr):  # fmt: skip
    """Writes d x of one block."""
    column_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    tile, sample = pid // column_blocks % tiles, (pid // column_blocks // tiles).to(tl.int64)
    cols = pid % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += sample * plane * C
    grad_ptr += sample * plane * C
    moments_ptr += sample * (5 * C)
    coefficients_ptr += sample * (2 * C)
    scale = tl.load(moments_ptr + 3 * C + cols, mask=cols < C, other=0.0)[None, :]
    slope = tl.load(coefficients_ptr + cols, mask=cols < C, other=0.0)[None, :]
    shift = tl.load(coefficients_ptr + C + cols, mask=cols < C, other=0.0)[None, :]
    for at in range(0, ROWS, BLOCK_P):
        first = tile * ROWS + at
        centred, grad = centred_and_gradient(
            x_ptr, grad_ptr, moments_ptr, first, plane, cols, C, BLOCK_P, ELU
        )
        grad_x = tl.fma(grad, scale, tl.fma(centred, slope, shift))
        to, inside = sample_block(out_ptr + sample * plane * C, first, plane, cols, C, BLOCK_P)
        tl.store(to, grad_x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_samples_kernel(grads_ptr, out_ptr, samples, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
                       BLOCK: tl.constexpr):  # fmt: skip
    """Writes the sum over samples of grads (N, WIDTH), BLOCK_N samples at a time."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    first = samples * 0
    while first < samples:
        sample = (first + tl.arange(0, BLOCK_N))[:, None]
        inside = (sample < samples) & (cols < WIDTH)[None, :]
        pointers = grads_ptr + sample.to(tl.int64) * WIDTH + cols[None, :]
        total += tl.sum(tl.load(pointers, mask=inside, other=0.0), axis=0)
        first += BLOCK_N
    tl.store(out_ptr + cols, total, mask=cols < WIDTH)


def instance_norm_plus_backward(
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    elu: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes `reference.instance_norm_plus_backward` of channels-last maps.

    grad and x may have different dtypes out of the three. Not itself differentiable. Allocates.
    """
    check_maps(x=x, grad=grad)
    n, c, height, width = x.shape
    plane, device, grad_x = height * width, x.device, torch.empty_like(x)
    named = (("alpha", alpha), ("gamma", gamma), ("beta", beta))
    rows = [in_rows(name, parameter, x) for name, parameter in named]
    (alpha_rows, gamma_rows, beta_rows), (a, g, b) = zip(*rows, strict=True)
    grads = torch.zeros((n, 3, c), dtype=torch.float32, device=device)
    if x.numel():
        partials, split = launch_statistics(x, None)
        tiles = power_of_2(split.tiles)
        chunk = min(power_of_2(c), norm_statistics.TILE_ELEMENTS // tiles)
        chunks = {"C": c, "TILES": tiles, "CHUNK": chunk}
        blocks = {
            "C": c, "ROWS": split.rows, "BLOCK_P": split.block_p, "BLOCK_C": split.block_c,
            "ELU": elu, "warps": WARPS,
        }  # fmt: skip
        moments, rstd = grads.new_empty(n, 5, c), grads.new_empty(n)
        sums, coefficients = torch.empty_like(partials), grads.new_empty(n, 2, c)
        programs = n * split.tiles * cdiv(c, split.block_c)
        launch.start(
            shared_kernel, n, device, partials, alpha_rows, gamma_rows, beta_rows, moments, rstd,
            a, g, b, plane, split.tiles, eps, ROWS=split.rows, warps=WARPS, **chunks,
        )  # fmt: skip
        launch.start(
            reduce_kernel, programs, device, x, grad, moments, sums, plane, split.tiles, **blocks
        )
        launch.start(
            coefficients_kernel, n, device, sums, moments, rstd, alpha_rows, gamma_rows, grads,
            coefficients, a, g, plane, split.tiles, warps=WARPS, **chunks,
        )  # fmt: skip
        launch.start(
            grad_x_kernel, programs, device, x, grad, moments, coefficients, grad_x, plane,
            split.tiles, **blocks,
        )  # fmt: skip
    return grad_x, *_parameter_gradients(grads, (alpha, gamma, beta))


def _parameter_gradients(
    grads: Tensor, parameters: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients (N, 3, C) per sample, or their sum for shared parameters."""
    n, _, c = grads.shape
    total = torch.zeros((3, c), dtype=torch.float32, device=grads.device)
    if n and c and any(parameter.ndim == 1 for parameter in parameters):
        launch.start(
            sum_samples_kernel, cdiv(3 * c, SHARED_CHANNELS), grads.device, grads, total, n,
            WIDTH=3 * c, BLOCK_N=32, BLOCK=SHARED_CHANNELS, warps=4,
        )  # fmt: skip
    alpha, gamma, beta = (
        (total[i] if parameter.ndim == 1 else grads[:, i]).to(parameter.dtype)
        for i, parameter in enumerate(parameters)
    )
    return alpha, gamma, beta

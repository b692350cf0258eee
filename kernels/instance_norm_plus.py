"""Instance normalisation++ (Song & Ermon 2019, appendix A), optionally followed by ELU.

    y = gamma ((x - mu) / sqrt(var + eps) + alpha (mu - m) / sqrt(v + eps)) + beta
    mu, var: mean and biased variance of a channel over its plane; m, v: mean and unbiased variance
    of mu over all channels of the sample (v = 0 for a single channel)

With a bias, x + bias is normalised without being written: only mu and m change.

Maps are (N, P, C) in memory, P = H W pixels. Two launches: `statistics_kernel` reduces tiles of
pixels (norm_statistics.py); `apply_kernel` merges the tiles of its sample, standardises the means
over the channels and writes y. Samples of up to SINGLE_BYTES take one launch, `single_kernel`, with
one program per sample.

Each element is read twice and written once: 6 bytes in bfloat16, or 4 if the second read is a cache
hit. For the sake of that hit small samples take one launch, and `apply_kernel` starts with the
samples that were read last. Memory-bound.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from ncsn_fast.kernels import norm_statistics
from ncsn_fast.kernels.launch import cdiv, check_bias, check_maps, power_of_2, start
from ncsn_fast.kernels.norm_statistics import (
    WARPS,
    Tiling,
    biased,
    inverse_root,
    launch_statistics,
    merged_tiles,
    range_statistics,
    spread,
    spread_of_means,
    write,
)
from torch import Tensor

SINGLE_BYTES = 32 * 1024  # larger samples would be too slow on one multiprocessor
SINGLE_CHANNELS = 512
SINGLE_WARPS = 16


@triton.jit
def affine(mean, variance, m, rstd_channels, eps, alpha_ptr, gamma_ptr, beta_ptr, inside):
    """Returns scale and shift of a channel in y = (x - mean) scale + shift."""
    alpha = tl.load(alpha_ptr, mask=inside, other=0.0)
    gamma = tl.load(gamma_ptr, mask=inside, other=0.0)
    beta = tl.load(beta_ptr, mask=inside, other=0.0)
    scale = gamma * inverse_root(variance + eps)
    return scale, gamma * alpha * ((mean - m) * rstd_channels) + beta


@triton.jit(do_not_specialize=["alpha_row", "gamma_row", "beta_row", "samples"])
def apply_kernel(x_ptr, y_ptr, partials_ptr, bias_ptr, alpha_ptr, gamma_ptr, beta_ptr, alpha_row,
                 gamma_row, beta_row, samples, plane, tiles, eps, C: tl.constexpr,
                 ROWS: tl.constexpr, TILES: tl.constexpr, CHUNK: tl.constexpr,
                 APPLY_ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                 ACTIVATION: tl.constexpr):  # fmt: skip
    """Writes y of APPLY_ROWS pixels and BLOCK_C channels; *_row: parameter stride per sample."""
    column_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    row_blocks = tl.cdiv(plane, APPLY_ROWS)
    row_block = pid // column_blocks % row_blocks
    sample = (samples - 1 - pid // column_blocks // row_blocks).to(tl.int64)
    cols = pid % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    partials_ptr += sample * tiles * (2 * C)
    m, rstd_channels = spread_of_means(
        partials_ptr, bias_ptr, plane, tiles, eps, C, ROWS, TILES, CHUNK
    )
    mean, variance = merged_tiles(partials_ptr, cols, plane, tiles, C, ROWS, TILES)
    scale, shift = affine(
        biased(mean, bias_ptr, cols, cols < C), variance, m, rstd_channels, eps,
        alpha_ptr + sample * alpha_row + cols, gamma_ptr + sample * gamma_row + cols,
        beta_ptr + sample * beta_row + cols, cols < C,
    )  # fmt: skip
    write(
        x_ptr + sample * plane * C, y_ptr + sample * plane * C, row_block * APPLY_ROWS, plane, cols,
        mean, scale, shift, C, APPLY_ROWS, BLOCK_P, ACTIVATION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["alpha_row", "gamma_row", "beta_row"])
def single_kernel(x_ptr, y_ptr, bias_ptr, alpha_ptr, gamma_ptr, beta_ptr, alpha_row, gamma_row,
                  beta_row, plane, eps, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr,
                  BLOCK_C: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """Normalises one sample, all channels; ROWS is at least its number of pixels."""
    sample = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    inside = cols < C
    first = tl.program_id(0) * 0
    x_base, y_base = x_ptr + sample * plane * C, y_ptr + sample * plane * C
    mean, squares = range_statistics(x_base, first, cols, plane, C, ROWS, BLOCK_P)
    mean_biased = biased(mean, bias_ptr, cols, inside)
    m, spread_squares = spread(mean_biased, inside, tl.cast(C, tl.float32))
    rstd_channels = inverse_root(spread_squares / (C - 1 if C > 1 else 1) + eps)
    scale, shift = affine(
        mean_biased, squares / plane, m, rstd_channels, eps, alpha_ptr + sample * alpha_row + cols,
        gamma_ptr + sample * gamma_row + cols, beta_ptr + sample * beta_row + cols, inside,
    )  # fmt: skip
    write(x_base, y_base, first, plane, cols, mean, scale, shift, C, ROWS, BLOCK_P, ACTIVATION)


def is_single(x: Tensor) -> bool:
    """Returns whether one launch is the default; depends on C, H, W and dtype only."""
    sample_bytes = x.shape[1] * x.shape[2] * x.shape[3] * x.element_size()
    return x.shape[1] <= SINGLE_CHANNELS and sample_bytes <= SINGLE_BYTES


def in_rows(name: str, parameter: Tensor, x: Tensor) -> tuple[Tensor, int]:
    """Returns the parameter in float32 and its stride from one sample to the next, in floats."""
    n, c = x.shape[:2]
    if parameter.shape not in ((c,), (n, c)):
        raise ValueError(
            f"{name} must have shape ({c},) or ({n}, {c}) for x of shape {tuple(x.shape)}; got "
            f"{tuple(parameter.shape)}"
        )
    if parameter.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x; it is on {parameter.device}")
    if parameter.dtype != torch.float32 or parameter.stride(-1) != 1:
        parameter = parameter.to(torch.float32).contiguous()
    return parameter, parameter.stride(0) if parameter.ndim == 2 else 0


def apply_meta(channels: int, split: Tiling) -> dict[str, int]:
    """Returns block sizes of `apply_kernel`.

    They have enough rows that reading the partials costs little.
    """
    elements, tiles = norm_statistics.TILE_ELEMENTS, power_of_2(split.tiles)
    block_c = min(power_of_2(channels), 256)
    block_p = min(elements // block_c, power_of_2(split.rows * split.tiles))
    return {
        "C": channels,
        "ROWS": split.rows,
        "TILES": tiles,
        "CHUNK": min(power_of_2(channels), elements // tiles),
        "APPLY_ROWS": max(block_p, 16 * tiles),
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
    }


def instance_norm_plus(
    x: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    elu: bool = False,
    eps: float = 1e-5,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    partials: Tensor | None = None,
    form: Literal["auto", "split", "single"] = "auto",
) -> Tensor:
    """Applies `reference.instance_norm_plus` to a channels-last float32, bfloat16 or float16 map.

    Args:
        alpha, gamma, beta: (C,) or (N, C) each; float32 with unit stride is read without a copy.
        bias: (C,) float32; normalises x + bias, unrounded.
        out: receives y; shape of x, channels-last, any of the three dtypes; may be x.
        partials: workspace from `new_partials(x)`. With out and partials nothing is allocated.
        form: two launches ("split"), one ("single", up to 512 channels), or by shape.

    Raises:
        TypeError, ValueError: for anything else, naming what is supported.
    """
    out = torch.empty_like(x) if out is None else out
    check_maps(x=x, out=out)
    check_bias(bias, x)
    n, c, height, width = x.shape
    rows = [
        in_rows(name, parameter, x)
        for name, parameter in (("alpha", alpha), ("gamma", gamma), ("beta", beta))
    ]
    tensors, strides = (list(column) for column in zip(*rows, strict=True))
    if form not in ("auto", "split", "single") or (form == "single" and c > SINGLE_CHANNELS):
        raise ValueError(
            f'form must be "auto", "split", or up to {SINGLE_CHANNELS} channels "single"; got '
            f"{form!r} for {c} channels"
        )
    if x.numel() == 0:
        return out
    plane = height * width
    if form == "single" or (form == "auto" and is_single(x)):
        block_c = power_of_2(c)
        block_p = min(power_of_2(plane), 2 * norm_statistics.TILE_ELEMENTS // block_c)
        start(
            single_kernel, n, x.device, x, out, bias, *tensors, *strides, plane, eps, C=c,
            ROWS=cdiv(plane, block_p) * block_p, BLOCK_P=block_p, BLOCK_C=block_c,
            ACTIVATION="elu" if elu else "none", warps=SINGLE_WARPS,
        )  # fmt: skip
        return out
    partials, split = launch_statistics(x, partials)
    meta = apply_meta(c, split)
    programs = n * cdiv(plane, meta["APPLY_ROWS"]) * cdiv(c, meta["BLOCK_C"])
    start(
        apply_kernel, programs, x.device, x, out, partials, bias, *tensors, *strides, n, plane,
        split.tiles, eps, ACTIVATION="elu" if elu else "none", warps=WARPS, **meta,
    )  # fmt: skip
    return out

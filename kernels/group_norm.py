"""Group normalisation (Wu & He 2018), modulated and followed by an activation.

    h = x + add,   u = (h - mu) / sqrt(var + eps) gamma + beta
    y = activation(u (1 + scale) + shift)
    mu, var: mean and biased variance of a group of channels over its plane of P = H W pixels

Maps are (N, P, C) in memory. Three launches: `statistics_kernel` reduces tiles of pixels to the
mean and M2 of each channel (norm_statistics.py), `coefficients_kernel` merges the tiles and the
channels of a group to mean, scale and shift of each channel, and `group_apply_kernel` writes y.
What is added moves the means of channels only, so x + add is never written. Samples of up to
SINGLE_BYTES whose groups have a power of two of channels take one launch, `group_single_kernel`,
with one program per sample.

Each element is read twice and written once: 6 bytes in bfloat16, or 4 if the second read is a cache
hit; `group_apply_kernel` starts with the samples that were read last. Memory-bound.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from ncsn_fast.kernels import norm_statistics
from ncsn_fast.kernels.launch import cdiv, check_activation, check_maps, power_of_2, start
from ncsn_fast.kernels.norm_statistics import (
    WARPS,
    inverse_root,
    launch_statistics,
    merge,
    merged_tiles,
    range_statistics,
    write,
)
from torch import Tensor

SINGLE_BYTES = 32 * 1024  # larger samples would be too slow on one multiprocessor
SINGLE_CHANNELS = 512
SINGLE_WARPS = 16
ROWS = ("add", "scale", "shift")  # parameters of each sample


@triton.jit
def optional_load(pointer, offsets, inside, OTHERWISE: tl.constexpr):
    """Loads from an optional pointer: OTHERWISE everywhere if it is None."""
    if pointer is None:
        value = tl.full(offsets.shape, OTHERWISE, tl.float32)
    else:
        value = tl.load(pointer + offsets, mask=inside, other=OTHERWISE)
    return value


@triton.jit
def row_moments(values, inside, count):
    """Returns mean and M2 of each row of `count` values; see `block_statistics`."""
    mean = tl.sum(tl.where(inside, values, 0.0), axis=1) / count
    rest = tl.where(inside, values - mean[:, None], 0.0)
    total = tl.sum(rest, axis=1)
    correction = total / count
    return mean + correction, tl.maximum(tl.sum(rest * rest, axis=1) - total * correction, 0.0)


@triton.jit
def affine(mean, rstd, cols, at, inside, gamma_ptr, beta_ptr, add_ptr, scale_ptr, shift_ptr):
    """Returns mean, scale and shift of channels in y = (x - mean) scale + shift.

    Args:
        mean, rstd: of their groups, to broadcast against them.
        cols, at, inside: their numbers, their places in parameters (N, C), and which there are.
    """
    modulation = 1.0 + optional_load(scale_ptr, at, inside, 0.0)
    beta = optional_load(beta_ptr, cols, inside, 0.0)
    return (
        mean - optional_load(add_ptr, at, inside, 0.0),
        optional_load(gamma_ptr, cols, inside, 1.0) * rstd * modulation,
        tl.fma(beta, modulation, optional_load(shift_ptr, at, inside, 0.0)),
    )


@triton.jit
def coefficients_kernel(partials_ptr, coefficients_ptr, gamma_ptr, beta_ptr, add_ptr, scale_ptr,
                        shift_ptr, plane, tiles, eps, C: tl.constexpr, SIZE: tl.constexpr,
                        ROWS: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr,
                        MEMBERS: tl.constexpr):  # fmt: skip
    """Writes coefficients (N, 3, C): mean, scale and shift of each channel of GROUPS groups.

    SIZE: channels of a group, which are read MEMBERS at a time.
    """
    blocks: tl.constexpr = (C // SIZE + GROUPS - 1) // GROUPS
    pid = tl.program_id(0)
    sample = (pid // blocks).to(tl.int64)
    partials_ptr += sample * tiles * (2 * C)
    index = tl.arange(0, GROUPS * MEMBERS)
    group, member = pid % blocks * GROUPS + index // MEMBERS, index % MEMBERS
    mean = tl.zeros((GROUPS,), tl.float32)
    squares, within = mean, mean
    for first in range(0, SIZE, MEMBERS):
        flat_inside = (group < C // SIZE) & (first + member < SIZE)
        flat_cols = tl.where(flat_inside, group * SIZE + first + member, C)
        means, variances = merged_tiles(partials_ptr, flat_cols, plane, tiles, C, ROWS, TILES)
        cols = tl.reshape(flat_cols, (GROUPS, MEMBERS))
        inside = tl.reshape(flat_inside, (GROUPS, MEMBERS))
        moved = tl.reshape(means, (GROUPS, MEMBERS))
        moved += optional_load(add_ptr, sample * C + cols, inside, 0.0)
        count = tl.cast(tl.minimum(SIZE - first, MEMBERS), tl.float32)
        chunk_mean, chunk_squares = row_moments(moved, inside, count)
        done = tl.cast(first, tl.float32)
        mean, squares = merge(mean, squares, done, chunk_mean, chunk_squares, count)
        own = tl.where(inside, tl.reshape(variances, (GROUPS, MEMBERS)), 0.0)
        within += tl.sum(own, axis=1)
    rstd = inverse_root((within + squares) / SIZE + eps)
    for first in range(0, SIZE, MEMBERS):
        flat_inside = (group < C // SIZE) & (first + member < SIZE)
        cols = tl.reshape(group * SIZE + first + member, (GROUPS, MEMBERS))
        inside = tl.reshape(flat_inside, (GROUPS, MEMBERS))
        centre, scale, shift = affine(
            mean[:, None], rstd[:, None], cols, sample * C + cols, inside, gamma_ptr, beta_ptr,
            add_ptr, scale_ptr, shift_ptr,
        )  # fmt: skip
        to = coefficients_ptr + sample * (3 * C) + cols
        tl.store(to, tl.broadcast_to(centre, (GROUPS, MEMBERS)), mask=inside)
        tl.store(to + C, scale, mask=inside)
        tl.store(to + 2 * C, shift, mask=inside)


@triton.jit(do_not_specialize=["samples"])
def group_apply_kernel(x_ptr, y_ptr, coefficients_ptr, samples, plane, C: tl.constexpr,
                       APPLY_ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                       ACTIVATION: tl.constexpr):  # fmt: skip
    """Writes y of APPLY_ROWS pixels and BLOCK_C channels."""
    column_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    row_blocks = tl.cdiv(plane, APPLY_ROWS)
    row_block = pid // column_blocks % row_blocks
    sample = (samples - 1 - pid // column_blocks // row_blocks).to(tl.int64)
    cols = pid % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    at = coefficients_ptr + sample * (3 * C) + cols
    mean = tl.load(at, mask=cols < C, other=0.0)
    scale = tl.load(at + C, mask=cols < C, other=0.0)
    shift = tl.load(at + 2 * C, mask=cols < C, other=0.0)
    write(
        x_ptr + sample * plane * C, y_ptr + sample * plane * C, row_block * APPLY_ROWS, plane, cols,
        mean, scale, shift, C, APPLY_ROWS, BLOCK_P, ACTIVATION,
    )  # fmt: skip


@triton.jit
def group_single_kernel(x_ptr, y_ptr, gamma_ptr, beta_ptr, add_ptr, scale_ptr, shift_ptr, plane,
                        eps, C: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
                        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                        ACTIVATION: tl.constexpr):  # fmt: skip
    """Normalises one sample, all channels; ROWS is at least its number of pixels."""
    sample = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    first = tl.program_id(0) * 0
    x_base, y_base = x_ptr + sample * plane * C, y_ptr + sample * plane * C
    mean, squares = range_statistics(x_base, first, cols, plane, C, ROWS, BLOCK_P)
    groups: tl.constexpr = BLOCK_C // SIZE
    rows, inside = tl.reshape(cols, (groups, SIZE)), tl.reshape(cols < C, (groups, SIZE))
    at = sample * C + rows
    moved = tl.reshape(mean, (groups, SIZE)) + optional_load(add_ptr, at, inside, 0.0)
    centre, spread = row_moments(moved, inside, SIZE)
    within = tl.sum(tl.reshape(squares, (groups, SIZE)), axis=1) / plane
    rstd = inverse_root((within + spread) / SIZE + eps)
    centre, scale, shift = affine(
        centre[:, None], rstd[:, None], rows, at, inside, gamma_ptr, beta_ptr, add_ptr, scale_ptr,
        shift_ptr,
    )  # fmt: skip
    centre = tl.broadcast_to(centre, (groups, SIZE))
    write(
        x_base, y_base, first, plane, cols, tl.reshape(centre, (BLOCK_C,)),
        tl.reshape(scale, (BLOCK_C,)), tl.reshape(shift, (BLOCK_C,)), C, ROWS, BLOCK_P, ACTIVATION,
    )  # fmt: skip


def fits_single(channels: int, groups: int) -> bool:
    """Returns whether one launch can serve: groups of a power of two, and few channels."""
    size = channels // groups
    return channels <= SINGLE_CHANNELS and size == power_of_2(size)


def is_single(x: Tensor, groups: int) -> bool:
    """Returns whether one launch is the default; depends on C, H, W, dtype and groups only."""
    sample_bytes = x.shape[1] * x.shape[2] * x.shape[3] * x.element_size()
    return fits_single(x.shape[1], groups) and sample_bytes <= SINGLE_BYTES


def elements_at_once(x: Tensor, out: Tensor) -> int:
    """Returns the elements that a program of 8 warps holds; exact activations need registers."""
    wide = torch.float32 in (x.dtype, out.dtype)
    return norm_statistics.TILE_ELEMENTS // (2 if wide else 1)


def new_workspace(x: Tensor) -> tuple[Tensor, Tensor]:
    """Allocates partials and coefficients (N, 3, C), float32, uninitialised."""
    n, c = x.shape[:2]
    coefficients = torch.empty((n, 3, c), dtype=torch.float32, device=x.device)
    return norm_statistics.new_partials(x), coefficients


def in_row(name: str, parameter: Tensor | None, shape: tuple[int, ...], x: Tensor) -> Tensor | None:
    """Returns an optional parameter in float32, contiguous."""
    if parameter is None:
        return None
    if parameter.shape != shape:
        raise ValueError(
            f"{name} must have shape {shape} for x of shape {tuple(x.shape)}; got "
            f"{tuple(parameter.shape)}"
        )
    if parameter.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x; it is on {parameter.device}")
    return parameter.to(torch.float32).contiguous()


def check(x: Tensor, out: Tensor, groups: int, activation: str, form: str) -> None:
    """Raises unless the kernels take these arguments."""
    check_maps(x=x, out=out)
    c = x.shape[1]
    if groups < 1 or c % groups:
        raise ValueError(f"groups must divide the {c} channels of x; got {groups}")
    check_activation(activation)
    if form not in ("auto", "split", "single"):
        raise ValueError(f'form must be "auto", "split" or "single"; got {form!r}')
    if form == "single" and not fits_single(c, groups):
        raise ValueError(
            f'form "single" takes up to {SINGLE_CHANNELS} channels in groups of a power of two; '
            f"got {c} in {groups} groups"
        )


def check_coefficients(coefficients: Tensor, x: Tensor) -> None:
    """Raises unless coefficients are float32 (N, 3, C), contiguous, on the device of the map."""
    shape = (x.shape[0], 3, x.shape[1])
    if coefficients.shape != shape or coefficients.dtype != torch.float32:
        raise ValueError(
            f"coefficients must be float32 of shape {shape}; got {tuple(coefficients.shape)}, "
            f"{coefficients.dtype}. Use new_workspace(x)."
        )
    if coefficients.device != x.device or not coefficients.is_contiguous():
        raise ValueError(
            f"coefficients must be contiguous, on {x.device} like x; got strides "
            f"{coefficients.stride()} on {coefficients.device}"
        )


def launch_apply(x: Tensor, out: Tensor, coefficients: Tensor, activation: str) -> None:
    """Writes out = activation((x - mean) scale + shift), with coefficients (N, 3, C) of the map."""
    n, c, height, width = x.shape
    plane = height * width
    at_once = elements_at_once(x, out)
    block_c = min(power_of_2(c), 256, at_once)
    block_p = min(at_once // block_c, power_of_2(plane))
    start(
        group_apply_kernel, n * cdiv(plane, block_p) * cdiv(c, block_c), x.device, x, out,
        coefficients, n, plane, C=c, APPLY_ROWS=block_p, BLOCK_P=block_p, BLOCK_C=block_c,
        ACTIVATION=activation, warps=WARPS,
    )  # fmt: skip


def scale_shift(
    x: Tensor, coefficients: Tensor, activation: str = "none", *, out: Tensor | None = None
) -> Tensor:
    """Computes activation((x - mean) scale + shift) of a channels-last map; out may be x.

    coefficients: (N, 3, C) float32, contiguous: mean, scale and shift of each channel and sample.
    With out nothing is allocated.
    """
    out = torch.empty_like(x) if out is None else out
    check_maps(x=x, out=out)
    check_activation(activation)
    check_coefficients(coefficients, x)
    launch_apply(x, out, coefficients, activation)
    return out


def group_norm(
    x: Tensor,
    groups: int,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
    out: Tensor | None = None,
    workspace: tuple[Tensor, Tensor] | None = None,
    form: Literal["auto", "split", "single"] = "auto",
) -> Tensor:
    """Applies `reference.group_norm` to a channels-last float32, bfloat16 or float16 map.

    Args:
        gamma, beta: (C,); add, scale, shift: (N, C). Contiguous float32 is read without a copy.
        out: receives y; shape of x, channels-last, any of the three dtypes; may be x.
        workspace: from `new_workspace(x)`. With out and workspace nothing is allocated.
        form: three launches ("split"), one ("single", see `fits_single`), or by shape.

    Raises:
        TypeError, ValueError: for anything else, naming what is supported.
    """
    out = torch.empty_like(x) if out is None else out
    check(x, out, groups, activation, form)
    n, c, height, width = x.shape
    parameters = [in_row(name, t, (c,), x) for name, t in (("gamma", gamma), ("beta", beta))]
    named = zip(ROWS, (add, scale, shift), strict=True)
    parameters += [in_row(name, t, (n, c), x) for name, t in named]
    if x.numel() == 0:
        return out
    plane, size = height * width, c // groups
    if form == "single" or (form == "auto" and is_single(x, groups)):
        block_c = power_of_2(c)
        block_p = min(power_of_2(plane), 2 * elements_at_once(x, out) // block_c)
        start(
            group_single_kernel, n, x.device, x, out, *parameters, plane, eps, C=c, SIZE=size,
            ROWS=cdiv(plane, block_p) * block_p, BLOCK_P=block_p, BLOCK_C=block_c,
            ACTIVATION=activation, warps=SINGLE_WARPS,
        )  # fmt: skip
        return out
    launch_split(x, out, groups, parameters, activation, eps, workspace)
    return out


def launch_split(
    x: Tensor,
    out: Tensor,
    groups: int,
    parameters: list[Tensor | None],
    activation: str,
    eps: float,
    workspace: tuple[Tensor, Tensor] | None,
) -> None:
    """Runs the three launches of `group_norm`."""
    n, c, height, width = x.shape
    plane, size = height * width, c // groups
    partials, coefficients = new_workspace(x) if workspace is None else workspace
    check_coefficients(coefficients, x)
    partials, split = launch_statistics(x, partials)
    elements, tiles = norm_statistics.TILE_ELEMENTS, power_of_2(split.tiles)
    members = min(power_of_2(size), max(elements // tiles, 1))
    together = min(power_of_2(groups), max(elements // (tiles * members), 1))
    start(
        coefficients_kernel, n * cdiv(groups, together), x.device, partials, coefficients,
        *parameters, plane, split.tiles, eps, C=c, SIZE=size, ROWS=split.rows, TILES=tiles,
        GROUPS=together, MEMBERS=members, warps=WARPS,
    )  # fmt: skip
    launch_apply(x, out, coefficients, activation)

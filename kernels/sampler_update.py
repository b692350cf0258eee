"""One row of a sampler's table: state, history, noise, known pixels, the network's next input.

    x' = a x + b f + g h + c z + e    h' = p x + q f + r    z = w0 z(stream 0) + w1 z(stream 3)
    then, where an element is known:  x' = known + c_ref z(stream 2)

x and h are (B, C, P) float32, P = H W, and are updated in place. f and the next input are accessed
through strides, so both may be channels-last and padded with zero channels. The row, its noise
steps and the noise keys are in device memory, and a device counter selects the row: a captured CUDA
graph can replay any of them.

A program processes some pixels of one sample, all channels. If P is a multiple of 4 (the fast path)
four elements of a channel share a Philox call; otherwise elements are counted flat. 3 channels
padded to 8 in bfloat16 take 19 bytes per element (x twice, f and the next input 16 bytes per
pixel), history 8 more, a mask with its values 5. Memory-bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from ncsn_fast.kernels import launch
from ncsn_fast.kernels.launch import cdiv, power_of_2
from ncsn_fast.kernels.noise import normals
from ncsn_fast.kernels.rows import Rows, new_rows
from torch import Tensor

MOST_CHANNELS = 64  # per tile that holds all channels; with more, elements are counted flat
TILE_ELEMENTS, WARPS = 1024, 4  # per program: 8 elements per thread


@triton.jit
def narrow(v, WIDTH: tl.constexpr):
    """Returns the first WIDTH columns of v (P, W), both powers of two."""
    v = tl.permute(tl.reshape(v, (v.shape[0], v.shape[1] // WIDTH, WIDTH)), (0, 2, 1))
    for _ in tl.static_range(10):
        if v.shape[2] > 1:
            pairs = tl.reshape(v, (v.shape[0], v.shape[1], 2, v.shape[2] // 2))
            v, _ = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    return tl.reshape(v, (v.shape[0], WIDTH))


@triton.jit
def widen(v, WIDTH: tl.constexpr):
    """Pads v (P, W) with zero columns to (P, WIDTH), both powers of two."""
    for _ in tl.static_range(10):
        if v.shape[1] < WIDTH:
            pairs = tl.permute(tl.join(v, tl.zeros_like(v)), (0, 2, 1))
            v = tl.reshape(pairs, (v.shape[0], 2 * v.shape[1]))
    return v


@triton.jit
def load_output(f_ptr, c, p, f_channel, f_pixel, valid, plane, start, F_WIDTH: tl.constexpr,
                TILE_C: tl.constexpr, TILE_P: tl.constexpr):  # fmt: skip
    """Loads the network's output (TILE_C, TILE_P) in float32.

    F_WIDTH: channels of a padded pixel.
    """
    if F_WIDTH > 0:
        pixel = start + tl.arange(0, TILE_P)[:, None]
        at = f_ptr + pixel.to(tl.int64) * F_WIDTH + tl.arange(0, F_WIDTH)[None, :]
        f = tl.trans(narrow(tl.load(at, mask=pixel < plane, other=0.0), TILE_C))
    else:
        at = f_ptr + c.to(tl.int64) * f_channel + p.to(tl.int64) * f_pixel
        f = tl.load(at, mask=valid, other=0.0)
    return f.to(tl.float32)


@triton.jit
def store_input(net_ptr, v, c, p, net_channel, net_pixel, valid, plane, start, C: tl.constexpr,
                NET_CHANNELS: tl.constexpr, NET_WIDTH: tl.constexpr, TILE_P: tl.constexpr,
                ):  # fmt: skip
    """Stores the next input: v (TILE_C, TILE_P), and zeros in channels C .. NET_CHANNELS - 1."""
    v = tl.where(valid, v, 0.0).to(net_ptr.dtype.element_ty)
    if NET_WIDTH > 0:
        pixel = start + tl.arange(0, TILE_P)[:, None]
        at = net_ptr + pixel.to(tl.int64) * NET_WIDTH + tl.arange(0, NET_WIDTH)[None, :]
        tl.store(at, widen(tl.trans(v), NET_WIDTH), mask=pixel < plane)
    else:
        at = net_ptr + c.to(tl.int64) * net_channel + p.to(tl.int64) * net_pixel
        tl.store(at, v, mask=valid)
        for k in tl.static_range(1, (NET_CHANNELS + C - 1) // C):
            pad = at + k * C * tl.cast(net_channel, tl.int64)
            tl.store(pad, tl.zeros_like(v), mask=valid & (c + k * C < NET_CHANNELS))


@triton.jit
def row_noise(seed, key, step, weights_ptr, sample, quad, ROWS: tl.constexpr, N: tl.constexpr):
    """Returns z = w0 z(stream 0) + w1 z(stream 3), or z(stream 0) without weights."""
    z = normals(seed, key, step, 0, quad, ROWS, N)
    if weights_ptr is not None:
        second = normals(seed, key, step, 3, quad, ROWS, N)
        z *= tl.load(weights_ptr + 2 * sample)
        z = tl.fma(tl.load(weights_ptr + 2 * sample + 1), second, z)
    return z


@triton.jit
def impose_known(new, table_ptr, mask_ptr, known_ptr, at, valid, seed, key, step, quad,
                 TILE_C: tl.constexpr, TILE_P: tl.constexpr):  # fmt: skip
    """Sets known elements to known + c_ref z(stream 2), unless c_ref is NaN."""
    scale = tl.load(table_ptr + 8)
    if scale == scale:
        is_known = tl.load(mask_ptr + at, mask=valid, other=0) != 0
        known = tl.load(known_ptr + at, mask=valid, other=0.0)
        z = normals(seed, key, step, 2, quad, TILE_C, TILE_P)
        new = tl.where(is_known, tl.fma(scale, z, known), new)
    return new


@triton.jit
def update_kernel(
    x_ptr, h_ptr, f_ptr, table_ptr, steps_ptr, counter_ptr, seeds_ptr, samples_ptr, weights_ptr,
    mask_ptr, known_ptr, net_ptr, nonfinite_ptr, n_rows, plane, f_sample, f_channel, f_pixel,
    net_sample, net_channel, net_pixel, C: tl.constexpr, F_WIDTH: tl.constexpr,
    NET_CHANNELS: tl.constexpr, NET_WIDTH: tl.constexpr, FLAT: tl.constexpr, TILE_C: tl.constexpr,
    TILE_P: tl.constexpr,
):  # fmt: skip
    """Updates TILE_P pixels of all channels, or (FLAT) TILE_P elements in C, H, W order."""
    row = tl.load(counter_ptr)
    if row >= n_rows:
        return  # past the end of the table
    blocks = tl.cdiv(plane * C if FLAT else plane, TILE_P)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * TILE_P
    element = start + tl.arange(0, TILE_P)[None, :]
    quad = start // 4 + tl.arange(0, TILE_P // 4)[None, :]
    if FLAT:
        c, p = element // plane, element % plane
        valid = element < C * plane
    else:
        c, p = tl.arange(0, TILE_C)[:, None], element
        valid = (c < C) & (p < plane)
        element = c * plane + p
        quad = c * (plane // 4) + quad
    seed, key = tl.load(seeds_ptr + sample), tl.load(samples_ptr + sample)
    step = tl.load(steps_ptr + 2 * row)
    table_ptr += row * 12
    base = sample * plane * C
    x = tl.load(x_ptr + base + element, mask=valid, other=0.0)
    f = load_output(
        f_ptr + sample * f_sample, c, p, f_channel, f_pixel, valid, plane, start, F_WIDTH, TILE_C,
        TILE_P,
    )  # fmt: skip
    new = tl.fma(tl.load(table_ptr), x, tl.load(table_ptr + 6))
    new = tl.fma(tl.load(table_ptr + 1), f, new)
    if h_ptr is not None:
        h = tl.load(h_ptr + base + element, mask=valid, other=0.0)
        new = tl.fma(tl.load(table_ptr + 2), h, new)
        h = tl.fma(tl.load(table_ptr + 4), x, tl.load(table_ptr + 7))
        h = tl.fma(tl.load(table_ptr + 5), f, h)
        tl.store(h_ptr + base + element, h, mask=valid)
    noise_scale = tl.load(table_ptr + 3)
    if noise_scale != 0.0:
        z = row_noise(seed, key, step, weights_ptr, sample, quad, TILE_C, TILE_P)
        new = tl.fma(noise_scale, z, new)
    if mask_ptr is not None:
        step = tl.load(steps_ptr + 2 * row + 1)
        new = impose_known(
            new, table_ptr, mask_ptr, known_ptr, base + element, valid, seed, key, step, quad,
            TILE_C, TILE_P,
        )  # fmt: skip
    tl.store(x_ptr + base + element, new, mask=valid)
    if net_ptr is not None:
        net = tl.fma(tl.load(table_ptr + 9), new, tl.load(table_ptr + 10))
        store_input(
            net_ptr + sample * net_sample, net, c, p, net_channel, net_pixel,
            valid, plane, start, C, NET_CHANNELS, NET_WIDTH, TILE_P,
        )  # fmt: skip
    if nonfinite_ptr is not None:
        flags = nonfinite_ptr + sample + tl.zeros_like(element)  # all writers write 1
        tl.store(flags, tl.full(element.shape, 1, tl.int32), mask=valid & (new - new != 0.0))


@triton.jit
def advance_kernel(counter_ptr):
    """Increments the row counter."""
    tl.store(counter_ptr, tl.load(counter_ptr) + 1)


def advance(rows: Rows) -> None:
    """Advances to the next row; a launch of its own, so that graphs need no atomics."""
    launch.start(advance_kernel, 1, rows.counter.device, rows.counter, warps=1)


def pixel_stride(name: str, x: Tensor) -> int:
    """Returns the stride, in elements, from one pixel to the next in H, W order."""
    height, width = x.shape[2:]
    if width == 1:
        return x.stride(2) if height > 1 else 0
    if height > 1 and x.stride(2) != width * x.stride(3):
        raise ValueError(
            f"{name} must be contiguous or channels-last, maybe padded with channels; got shape "
            f"{tuple(x.shape)} with strides {x.stride()}"
        )
    return x.stride(3)


def padded_width(x: Tensor, tile_c: int) -> int:
    """Returns the channels of a pixel in memory if whole pixels can be accessed, else 0."""
    width, n, plane = x.stride(3), x.shape[0], x.shape[2] * x.shape[3]
    fits = x.stride(1) == 1 and tile_c <= width <= 64 and width == power_of_2(width)
    end = x.storage_offset() + (n - 1) * x.stride(0) + plane * width
    held = x.untyped_storage().nbytes() // x.element_size()
    return width if fits and x.shape[3] > 1 and end <= held else 0


def _expect(name: str, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype,
            device: torch.device) -> None:  # fmt: skip
    if x is None:
        return
    if tuple(x.shape) != shape or x.dtype != dtype or not x.is_contiguous() or x.device != device:
        raise ValueError(
            f"{name} must be contiguous, {dtype}, of shape {shape}, on {device}; got {x.dtype}, "
            f"{tuple(x.shape)} with strides {x.stride()} on {x.device}"
        )


def _check(x: Tensor, f: Tensor, net_input: Tensor | None) -> None:
    if x.ndim != 4 or x[:1].numel() >= 2**31:
        raise ValueError(f"x must be (B, C, H, W), below 2**31 a sample; got {tuple(x.shape)}")
    for name, t in (("f", f), ("net_input", net_input)):
        if t is None:
            continue
        n, c, height, width = x.shape
        more = name == "net_input" and t.ndim == 4 and t.shape[1] > c
        if tuple(t.shape) != (n, t.shape[1] if more else c, height, width) or t.device != x.device:
            raise ValueError(
                f"{name} must have the shape of x {tuple(x.shape)}, on {x.device}; got "
                f"{tuple(t.shape)} on {t.device}"
            )
        if t.dtype not in launch.DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16; got {t.dtype}")


def sampler_update_(
    x: Tensor,
    f: Tensor,
    h: Tensor | None,
    rows: Rows,
    *,
    seeds: Tensor,
    samples: Tensor,
    noise_weights: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    net_input: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> None:
    """Applies `reference.sampler_update` in place on x and h, with the row at `rows.counter`.

    Neither allocates nor synchronises, so it can be captured in a CUDA graph. The counter does not
    change; see `advance`.

    Args:
        x, h: (B, C, H, W) float32, contiguous.
        f: shape of x, float32, bfloat16 or float16, contiguous or channels-last; may be the first C
            channels of a padded map.
        seeds, samples: (B,) int64 below 2^32, the key of each sample's noise.
        noise_weights: (B, 2) float32.   mask, known: bool and float32, contiguous, shape of x.
        net_input: receives scale x' + shift of the row; (B, C', H, W), C' >= C, any dtype and
            layout allowed for f. Channels C and above are set to zero.
        nonfinite: (B,) int32, set to 1 where a sample's new state is not finite.
    """
    _check(x, f, net_input)
    shape, n, c, plane = tuple(x.shape), x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    if (mask is None) != (known is None):
        raise ValueError("mask and known come together; only one of them was given")
    for name, t in (("x", x), ("h", h), ("known", known)):
        _expect(name, t, shape, torch.float32, x.device)
    _expect("mask", mask, shape, torch.bool, x.device)
    for name, t in (("seeds", seeds), ("samples", samples)):
        _expect(name, t, (n,), torch.int64, x.device)
    _expect("noise_weights", noise_weights, (n, 2), torch.float32, x.device)
    _expect("nonfinite", nonfinite, (n,), torch.int32, x.device)
    if x.numel() == 0:
        return
    flat = plane % 4 != 0 or c > MOST_CHANNELS
    tile_c = 1 if flat else power_of_2(c)
    tile_p = min(TILE_ELEMENTS // tile_c, max(power_of_2(c * plane // tile_c), 4))
    net = f if net_input is None else net_input
    f_width, net_width = (0 if flat else padded_width(t, tile_c) for t in (f, net))
    widest = tile_p * max(tile_c, f_width, net_width)
    launch.start(
        update_kernel, n * cdiv(c * plane if flat else plane, tile_p), x.device, x, h, f,
        rows.table, rows.steps, rows.counter, seeds, samples, noise_weights, mask, known, net_input,
        nonfinite, len(rows.table), plane, f.stride(0), f.stride(1), pixel_stride("f", f),
        net.stride(0), net.stride(1), pixel_stride("net_input", net),
        C=c, F_WIDTH=f_width, NET_CHANNELS=net.shape[1], NET_WIDTH=net_width, FLAT=flat,
        TILE_C=tile_c, TILE_P=tile_p, warps=min(WARPS, power_of_2(widest // 128)),
    )  # fmt: skip


def sampler_update(
    x: Tensor,
    f: Tensor,
    h: Tensor | None,
    coefficients: Sequence[float],
    *,
    seed: int,
    samples: Tensor,
    step: int,
    c_ref: float = math.nan,
    ref_step: int = 0,
    scale: float = 2.0,
    shift: float = -1.0,
    **options: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Applies `reference.sampler_update`, with its signature: one row, on copies of x and h."""
    constants = (0.0, 0.0)[len(coefficients) - 6 :]
    row = [*coefficients, *constants, c_ref, scale, shift]
    numbers = torch.tensor([row], dtype=torch.float64)
    rows = new_rows(numbers, torch.tensor([[step, ref_step]]), x.device)
    x_new, h_new = x.contiguous().clone(), None if h is None else h.contiguous().clone()
    seeds = torch.full_like(samples, seed)
    sampler_update_(x_new, f, h_new, rows, seeds=seeds, samples=samples, **options)
    return x_new, h_new

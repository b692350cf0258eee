"""Uniforms and normals of the noise contract (ncsn_fast/ops/noise.py), written into a given tensor.

Element e of sample b uses key (seed, sample) and counter (e // 4, step, stream, 0), so four
elements share a Philox call. Memory traffic: 4 bytes per element. Normals are compute-bound, some
40 operations per element; uniforms are bound by the ten rounds of Philox.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ncsn_fast.kernels import launch
from ncsn_fast.kernels.noise import in_order, normals, uniform, words
from torch import Tensor

BLOCK, WARPS = 1024, 4  # 2 quadruples per thread


@triton.jit(do_not_specialize=["stream", "step"])
def fill_kernel(out_ptr, seeds_ptr, samples_ptr, stream, step, count, NORMAL: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """Fills BLOCK elements of one sample, which has `count` elements."""
    blocks = tl.cdiv(count, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK
    quad = start // 4 + tl.arange(0, BLOCK // 4)[None, :]
    seed, key = tl.load(seeds_ptr + sample), tl.load(samples_ptr + sample)
    if NORMAL:
        value = normals(seed, key, step, stream, quad, 1, BLOCK)
    else:
        w0, w1, w2, w3 = words(seed, key, step, stream, quad)
        value = uniform(in_order(w0, w1, w2, w3, 1, BLOCK))
    at = start + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + sample * count + at, value, mask=at < count)


def _word(name: str, value: int) -> int:
    """Converts a uint32 to the int32 with the same bits, so that kernels see one type."""
    if not 0 <= value < 2**32:
        raise ValueError(f"{name} must be in [0, 2**32); got {value}")
    return value - (value >> 31 << 32)


def _fill(
    out: Tensor, seeds: Tensor, samples: Tensor, stream: int, step: int, normal: bool
) -> Tensor:
    if out.ndim == 0 or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(
            f"out must be float32, contiguous, of shape (B, ...); got {out.dtype}, "
            f"{tuple(out.shape)} with strides {out.stride()}"
        )
    if out[:1].numel() >= 2**31:
        raise ValueError(f"a sample must be below 2**31 elements; got {tuple(out.shape)}")
    n = len(out)
    for name, x in (("seeds", seeds), ("samples", samples)):
        found = (tuple(x.shape), x.dtype, x.device)
        if found != ((n,), torch.int64, out.device) or not x.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, torch.int64, of shape {(n,)}, on {out.device}; got "
                f"{x.dtype}, {tuple(x.shape)} with strides {x.stride()} on {x.device}"
            )
    stream, step = _word("stream", stream), _word("step", step)
    if out.numel() == 0:
        return out
    count = out.numel() // n
    launch.start(
        fill_kernel, n * launch.cdiv(count, BLOCK), out.device, out, seeds, samples, stream, step,
        count, NORMAL=normal, BLOCK=BLOCK, warps=WARPS,
    )  # fmt: skip
    return out


def uniform_(out: Tensor, seeds: Tensor, samples: Tensor, *, stream: int, step: int) -> Tensor:
    """Fills out (B, *shape), float32 and contiguous, with uniforms in [0, 1) and returns it.

    seeds, samples: (B,) int64 on the same device, each below 2^32, which is not checked. Neither
    allocates nor synchronises, so it can be captured in a CUDA graph.
    """
    return _fill(out, seeds, samples, stream, step, normal=False)


def normal_(out: Tensor, seeds: Tensor, samples: Tensor, *, stream: int, step: int) -> Tensor:
    """Fills out (B, *shape) with standard normals; arguments as for `uniform_`."""
    return _fill(out, seeds, samples, stream, step, normal=True)

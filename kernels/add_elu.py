"""Activation of the sum of one to three maps and a bias, with or without the sum as an output.

    s = ((a + b) + c) + bias,   y = activation(s), mostly ELU (alpha 1)

Maps may be weighted: s = ((w_a a + w_b b) + w_c c) + bias.

All maps have one layout and are treated as flat arrays; with a bias they are channels-last, where
the channel of an element is its index modulo C. Sums are float32, and y is computed from s before s
is rounded. Memory traffic per element in bfloat16: 4 bytes (ELU alone) to 10 (three maps, both
outputs). Memory-bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from ncsn_fast.kernels import launch
from ncsn_fast.kernels.maths import activate
from torch import Tensor

BLOCK, WARPS = 2048, 8
MOST_TERMS = 3


@triton.jit
def term(pointers, inside, weight, WEIGHTED: tl.constexpr):
    """Loads elements of a map in float32, times a weight if they have one."""
    value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        value *= weight
    return value


@triton.jit
def add_elu_kernel(a_ptr, b_ptr, c_ptr, bias_ptr, total_ptr, y_ptr, weight_a, weight_b, weight_c,
                   count, C: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
                   ACTIVATION: tl.constexpr, WEIGHTED: tl.constexpr):  # fmt: skip
    """Computes BLOCK elements of the sum and of its activation."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    inside = at < count
    total = term(a_ptr + at, inside, weight_a, WEIGHTED)
    if b_ptr is not None:
        total += term(b_ptr + at, inside, weight_b, WEIGHTED)
    if c_ptr is not None:
        total += term(c_ptr + at, inside, weight_c, WEIGHTED)
    if bias_ptr is not None:
        # One 64-bit division per program; those per element are 32-bit and by a constant.
        channel = ((start % C).to(tl.int32) + tl.arange(0, BLOCK)) % C
        # The compiler cannot prove that runs of RUN channels are contiguous; with these hints it
        # loads 16 bytes at a time.
        channel = tl.max_contiguous(tl.multiple_of(channel, RUN), RUN)
        total += tl.load(bias_ptr + channel)
    if total_ptr is not None:
        tl.store(total_ptr + at, total.to(total_ptr.dtype.element_ty), mask=inside)
    if y_ptr is not None:
        y = activate(total, ACTIVATION, y_ptr.dtype.element_ty != tl.float32)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def _check(**tensors: Tensor | None) -> None:
    given = {name: t for name, t in tensors.items() if t is not None}
    first = next(iter(given.values()))
    formats = (torch.contiguous_format, torch.channels_last)[: 2 if first.ndim == 4 else 1]
    if any(t.shape != first.shape or t.device != first.device for t in given.values()):
        found = ", ".join(f"{name} {tuple(t.shape)} on {t.device}" for name, t in given.items())
        raise ValueError(f"all must have one shape and be on one device; got {found}")
    if any(t.dtype not in launch.DTYPES for t in given.values()):
        found = ", ".join(f"{name} {t.dtype}" for name, t in given.items())
        raise TypeError(f"all must be float32, bfloat16 or float16; got {found}")
    if not any(all(t.is_contiguous(memory_format=f) for t in given.values()) for f in formats):
        found = ", ".join(f"{name} {t.stride()}" for name, t in given.items())
        raise ValueError(f"all must be contiguous, or all channels-last; got strides {found}")


def pointwise(
    terms: Sequence[Tensor],
    bias: Tensor | None,
    total: Tensor | None,
    out: Tensor | None,
    activation: str = "elu",
    weights: Sequence[float] = (),
) -> None:
    """Writes total = one to three maps plus a bias (C,) float32, out = activation(total), or both.

    total and out may each be one of the maps. Allocates nothing.

    Args:
        activation: a name of `ops.activations`.   weights: of the maps; all 1 if there are none.
    """
    if not 1 <= len(terms) <= MOST_TERMS or (total is None and out is None):
        raise ValueError(f"pointwise takes 1 to {MOST_TERMS} maps and writes one; got {len(terms)}")
    if weights and len(weights) != len(terms):
        raise ValueError(f"weights must be those of {len(terms)} maps; got {len(weights)}")
    launch.check_activation(activation)
    a, b, c = (*terms, None, None)[:3]
    _check(a=a, b=b, c=c, total=total, out=out)
    if bias is not None:
        launch.check_maps(a=a, b=b, c=c, total=total, out=out)
        launch.check_bias(bias, a)
    programs, channels = launch.cdiv(a.numel(), BLOCK), 1 if bias is None else len(bias)
    factors = (*(float(w) for w in weights), 1.0, 1.0, 1.0)[:MOST_TERMS]
    launch.start(
        add_elu_kernel, programs, a.device, a, b, c, bias, total, out, *factors, a.numel(),
        C=channels, RUN=math.gcd(channels, 16), BLOCK=BLOCK, ACTIVATION=activation,
        WEIGHTED=bool(weights), warps=WARPS,
    )  # fmt: skip


def elu(x: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Computes `reference.elu` of x, or of x + bias with bias (C,) float32; out may be x."""
    out = torch.empty_like(x) if out is None else out
    pointwise([x], bias, None, out)
    return out


def add_bias(x: Tensor, bias: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Computes x + bias in float32, bias (C,) float32; out may be x."""
    out = torch.empty_like(x) if out is None else out
    pointwise([x], bias, out, None)
    return out


def add(a: Tensor, b: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Computes (a + b) + bias in float32; out may be a or b."""
    out = torch.empty_like(a) if out is None else out
    pointwise([a, b], bias, out, None)
    return out


def add_elu(
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    total: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes `reference.add_elu` of a + b + bias and returns (total, out); each may be a or b.

    bias is (C,) float32. `add` writes the sum alone.
    """
    total = torch.empty_like(a) if total is None else total
    out = torch.empty_like(a) if out is None else out
    pointwise([a, b], bias, total, out)
    return total, out

"""Noise contract of ncsn_fast/ops/noise.py, for use inside kernels.

Philox4x32-10 with key (seed, sample) and counter (element // 4, step, stream, 0); its four words
give elements 4q .. 4q+3 through two Box-Muller pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from ncsn_fast.kernels.maths import cosine_quarter_turns, natural_log, sine_quarter_turns


@triton.jit
def words(seed, sample, step, stream, quad):
    """Returns four uint32 tensors like `quad` (int32).

    seed, sample: int64 scalars below 2^32. step, stream: the same, or int32 scalars with those 32
        bits.
    """
    zero = quad * 0
    key = (seed & 0xFFFFFFFF) | (sample << 32)
    return tl.philox(key, quad, zero + step.to(tl.int32), zero + stream, zero)


@triton.jit
def uniform(word):
    """Converts words to uniforms (w >> 8) 2^-24, in [0, 1)."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def box_muller(even, odd):
    """Returns two standard normals (r cos 2 pi u2, r sin 2 pi u2) from two words."""
    u1 = ((even >> 8).to(tl.int32) + 1).to(tl.float32) * 5.9604644775390625e-08
    radius = tl.sqrt_rn(-2.0 * natural_log(u1))
    # 2 pi u2 is `quadrant` + t quarter turns, |t| <= 1/2; integer arithmetic makes this exact.
    k = (odd >> 8).to(tl.int32)
    quadrant = (k + 2097152) >> 22
    t = (k - (quadrant << 22)).to(tl.float32) * 2.384185791015625e-07
    sine, cosine = sine_quarter_turns(t), cosine_quarter_turns(t)
    swap = (quadrant & 1) != 0
    first = tl.where(swap, sine, cosine)
    second = tl.where(swap, cosine, sine)
    first = tl.where(((quadrant + 1) & 2) != 0, -first, first)
    second = tl.where((quadrant & 2) != 0, -second, second)
    return radius * first, radius * second


@triton.jit
def in_order(v0, v1, v2, v3, ROWS: tl.constexpr, ELEMENTS: tl.constexpr):
    """Interleaves values of elements 4q .. 4q+3, each (ROWS, ELEMENTS / 4), to (ROWS, ELEMENTS)."""
    joined = tl.join(tl.join(v0, v2), tl.join(v1, v3))
    return tl.reshape(joined, (ROWS, ELEMENTS))


@triton.jit
def normals(seed, sample, step, stream, quad, ROWS: tl.constexpr, N: tl.constexpr):
    """Returns standard normals (ROWS, N), float32, from quads (ROWS, N / 4)."""
    w0, w1, w2, w3 = words(seed, sample, step, stream, quad)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return in_order(z0, z1, z2, z3, ROWS, N)

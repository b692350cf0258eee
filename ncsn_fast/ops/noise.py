"""Noise as a pure function of (seed, sample, stream, step, element), the same on every backend.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with
    key     = (seed, sample index)                       both uint32
    counter = (element // 4, step, stream, 0)            element counted in C, H, W order
gives four 32-bit words for elements 4q .. 4q+3. From them
    uniform:  (w >> 8) * 2^-24                                        in [0, 1)
    normal :  u1 = ((w_even >> 8) + 1) * 2^-24,  u2 = (w_odd >> 8) * 2^-24,
              r = sqrt(-2 ln u1),  (r cos 2 pi u2, r sin 2 pi u2)     |z| <= 5.77
Noise does not depend on the batch size, the position in the batch, the device or the number of
processes. So sample i is the same in a run of 256 and in a run of 1000, and an interrupted sampler
resumes exactly. This is called the noise contract.

This file is its reference implementation in plain PyTorch. Transcendentals are evaluated in float64
and rounded once to float32. The C++ and GPU kernels match it bit for bit on words and uniforms, and
to 4 ulp on normals.
"""

from __future__ import annotations

import enum
import math
import operator
from typing import Any

import torch
from torch import Tensor

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF
_ROUNDS = 10


class Stream(enum.IntEnum):
    """Independent random streams of one sample; 9 and above are free for users."""

    SAMPLER = 0
    INITIAL = 1
    REFERENCE = 2
    SECOND = 3
    CORRECTOR = 4
    DEQUANTISATION = 5
    PROBE = 6  # Hutchinson's trace estimator
    MEASUREMENT = 7  # of the commands
    TRAINING = 8  # levels and noise of a step


def check_integer(name: str, value: Any, least: int | None = None) -> int:
    """Returns an integer of any type (int, NumPy's, a tensor of one number) as an int.

    Raises:
        TypeError: it is a fraction, a bool or no number.
        ValueError: it is below `least`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer; got {value!r}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}; got {number}")
    return number


def check_uint32(name: str, value: int) -> int:
    """Returns `value` if it is an integer of 32 unsigned bits.

    Raises:
        TypeError: it is no integer.
        ValueError: it has another sign, or more bits.
    """
    value = check_integer(name, value)
    if not 0 <= value <= _MASK32:
        raise ValueError(
            f"{name} must be in [0, 2**32); got {value}. The noise contract has 32 bits for it."
        )
    return value


def sample_range(start: int, n: int) -> range:
    """Returns the indices start .. start+n-1 of n samples.

    Raises ValueError for n < 0 or indices beyond 32 bits, TypeError for fractions.
    """
    n, start = check_integer("n", n, least=0), check_integer("start", start)
    if n > 0:
        check_uint32("first sample index", start)
        check_uint32("last sample index", start + n - 1)
    return range(start, start + n)


def sample_indices(start: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns the indices of n samples as a tensor (n,) int64; raises as `sample_range` does."""
    indices = sample_range(start, n)
    return torch.arange(indices.start, indices.stop, dtype=torch.int64, device=device)


def as_indices(samples: Any) -> Tensor:
    """Returns sample indices (n,) as int64.

    Raises:
        TypeError, ValueError: they are no integers, or not in one row.
    """
    try:
        given = torch.as_tensor(samples)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"samples must be integer indices (n,); got {samples!r:.60}") from error
    indices = given.to(torch.int64)
    if indices.ndim != 1 or (len(given) and (given.is_floating_point() or given.is_complex())):
        raise ValueError(
            f"samples must be integer indices (n,); got {given.dtype} {tuple(given.shape)}"
        )
    return indices


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    # int64 products wrap modulo 2^64, so both 32-bit halves are exact after masking.
    product = x * constant
    return (product >> 32) & _MASK32, product & _MASK32


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Computes Philox4x32-10 and returns its four words.

    All tensors are int64, hold uint32 values and broadcast against each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIER[0], c0)
        high1, low1 = _multiply(_MULTIPLIER[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def words(seed: int, samples: Tensor, stream: int, step: int, numel: int) -> Tensor:
    """Returns the Philox words of samples (B,) int64.

    Shape (B, ceil(numel / 4), 4), int64 that hold uint32 values.
    """
    check_uint32("seed", seed)
    check_uint32("step", step)
    check_uint32("stream", stream)
    if samples.numel():
        check_uint32("smallest sample index", int(samples.min()))
        check_uint32("largest sample index", int(samples.max()))
    quad = torch.arange((numel + 3) // 4, dtype=torch.int64, device=samples.device)[None, :]
    zero = torch.zeros_like(quad)
    counter = (quad, zero + step, zero + stream, zero)
    key = (zero + seed, samples[:, None] + zero)
    return torch.stack(torch.broadcast_tensors(*philox4x32(counter, key)), dim=-1)


def uniform(seed: int, samples: Tensor, stream: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """Returns uniforms in [0, 1), float32 of shape (B, *shape)."""
    numel = math.prod(shape)
    w = words(seed, samples, stream, step, numel)
    u = (w >> 8).to(torch.float32) * 2.0**-24
    return u.flatten(1)[:, :numel].reshape(len(samples), *shape)


def box_muller(w_even: Tensor, w_odd: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two standard normals (float32) from two words: (r cos 2 pi u2, r sin 2 pi u2)."""
    u1 = ((w_even >> 8) + 1).to(torch.float64) * 2.0**-24
    radius = torch.sqrt(-2.0 * torch.log(u1))
    # Reduced exactly to a quarter turn, so that sine and cosine are exactly 0 at their zeros.
    quarter_turns = (w_odd >> 8).to(torch.float64) * 2.0**-22
    quadrant = torch.floor(quarter_turns + 0.5)
    angle = (quarter_turns - quadrant) * (math.pi / 2)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    k = quadrant.to(torch.int64) & 3
    cos_full = torch.where(
        k == 0, cosine, torch.where(k == 1, -sine, torch.where(k == 2, -cosine, sine))
    )
    sin_full = torch.where(
        k == 0, sine, torch.where(k == 1, cosine, torch.where(k == 2, -sine, -cosine))
    )
    return (radius * cos_full).to(torch.float32), (radius * sin_full).to(torch.float32)


def normal(seed: int, samples: Tensor, stream: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """Returns standard normals, float32 of shape (B, *shape)."""
    numel = math.prod(shape)
    w0, w1, w2, w3 = words(seed, samples, stream, step, numel).unbind(-1)
    z = torch.stack((*box_muller(w0, w1), *box_muller(w2, w3)), dim=-1)
    return z.flatten(1)[:, :numel].reshape(len(samples), *shape)

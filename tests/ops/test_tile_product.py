"""One product of tiles against an independent model of the instruction's documented arithmetic.

The model computes in exact fractions and rounds them to float32 itself; where nothing is tiny or
large, numpy's float64 gives the same numbers for many products at once.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch

from ncsn_fast import _C
from ncsn_fast.ops.addresses import array
from ncsn_fast.ops.extension import ISA_LEVELS

LEVELS = _C.isa_levels()
SMALLEST = Fraction(1, 2**126)  # that is no subnormal number
LARGEST = Fraction(2**128 - 2**104)


def bits_of(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.float32).view(np.uint32)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of numbers that bfloat16 holds exactly."""
    bits = bits_of(values)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def rounded(value: Fraction, zero: float) -> float:
    """Nearest float32, ties to even, with an unbounded exponent; then what is tiny becomes zero."""
    if value == 0:
        return zero
    sign, size = (-1.0 if value < 0 else 1.0), abs(value)
    exponent = 0
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while size < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    size = round(size / unit) * unit  # Python rounds ties to even
    if size < SMALLEST:
        return sign * 0.0
    return sign * (np.inf if size > LARGEST else float(size))


def is_negative(value: float) -> bool:
    return bool(np.signbit(value))


def fused(x: float, y: float, z: float) -> float:
    """x y + z with one rounding; operands that are subnormal are zeros."""
    x, y, z = (float(np.copysign(0.0, v)) if abs(v) < 2.0**-126 else v for v in (x, y, z))
    if not all(map(np.isfinite, (x, y, z))):
        with np.errstate(invalid="ignore"):
            return float(np.float64(x) * y + z)
    negative = is_negative(x) != is_negative(y)
    zero = -0.0 if negative and is_negative(z) else 0.0  # an exact zero: + unless both are -
    return rounded(Fraction(x) * Fraction(y) + Fraction(z), zero)


def model(sums: np.ndarray, a: np.ndarray, b: np.ndarray, some: list[int]) -> np.ndarray:
    """As the manual has it; a (16, 32) and b (16, 16, 2) are floats with bfloat16's digits.

    Only some rows and columns of the result are computed; the others are NaN.
    """
    out = np.full((16, 16), np.nan)
    for m in some:
        for n in some:
            even = odd = 0.0
            for k in range(16):
                even = fused(float(a[m, 2 * k]), float(b[k, n, 0]), even)
                odd = fused(float(a[m, 2 * k + 1]), float(b[k, n, 1]), odd)
            both = fused(even, 1.0, odd)
            out[m, n] = fused(float(sums[m, n]), 1.0, both)
    return out.astype(np.float32)


def product(sums: np.ndarray, a: np.ndarray, b: np.ndarray, level: str) -> np.ndarray:
    held = [
        torch.from_numpy(np.array(sums, dtype=np.float32)),
        torch.from_numpy(bfloat16(a).view(np.int16).copy()),
        torch.from_numpy(bfloat16(b).reshape(16, 32).view(np.int16).copy()),
    ]
    arrays = [array("tile", t, tuple(t.shape), t.dtype) for t in held]
    _C.tile_product(*arrays, (16, 16, 16), ISA_LEVELS[level])
    return held[0].numpy()


SOME = [0, 2, 3, 9, 15]  # rows and columns


def check(
    sums: np.ndarray, a: np.ndarray, b: np.ndarray, some: list[int] | None = None
) -> np.ndarray:
    """Returns the product, the same at every level, after comparing some of it with the model."""
    some = SOME if some is None else some
    at = np.ix_(some, some)
    expected = model(sums, a, b, some)[at]
    results = [product(sums, a, b, level) for level in LEVELS]
    for found, level in zip(results, LEVELS, strict=True):
        part = np.ascontiguousarray(found[at])
        same = (bits_of(part) == bits_of(expected)) | (np.isnan(part) & np.isnan(expected))
        assert same.all(), level
        assert np.array_equal(found, results[0], equal_nan=True), level
    return results[0]


def tile(shape: tuple[int, ...], scale: float, seed: int) -> np.ndarray:
    """Normals with bfloat16's digits."""
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))
    return (values * scale).bfloat16().float().numpy()


def operands(scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sums = np.random.default_rng(2).standard_normal((16, 16)).astype(np.float32)
    return sums, tile((16, 32), scale, 0), tile((16, 16, 2), scale, 1)


def test_ordinary_numbers():
    sums, a, b = operands()
    expected = check(sums, a, b, [*range(16)])
    exact = sums + np.einsum("mkp,knp->mn", a.reshape(16, 16, 2).astype(np.float64), b)
    assert np.abs(expected - exact).max() < 1e-5
    assert not np.array_equal(expected, exact.astype(np.float32))  # its order of sums shows


def test_even_and_odd_elements_are_summed_apart():
    """2^24 + 1 is 2^24 in float32: only sums apart keep the odd ones."""
    a, b = np.zeros((16, 32)), np.zeros((16, 16, 2))
    a[:, 0], a[:, 1], a[:, 3] = 2.0**24, 1.0, 1.0
    b[:] = 1.0
    assert (check(np.zeros((16, 16)), a, b) == 2.0**24 + 2).all()
    a[:, 1], a[:, 2], a[:, 3] = 0.0, 1.0, 0.0
    assert (check(np.zeros((16, 16)), a, b) == 2.0**24).all()


def test_multiplication_and_addition_round_once():
    """(1 + 2^-7)^2 - 1 keeps the last digit of the square beside a sum of 2^10."""
    a, b = np.zeros((16, 32)), np.zeros((16, 16, 2))
    a[:, 0], b[0, :, 0] = 2.0**10, 1.0
    a[:, 2], b[1, :, 0] = 1 + 2.0**-7, 1 + 2.0**-7
    a[:, 4], b[2, :, 0] = -(2.0**10), 1.0
    assert (check(np.zeros((16, 16)), a, b) == 1 + 2.0**-6).all()


@pytest.mark.parametrize("scale", [2.0**-64, 2.0**-63, 2.0**-60, 2.0**62, 2.0**64])
def test_tiny_results_are_flushed_and_large_ones_overflow(scale):
    sums, a, b = operands(scale)
    expected = check((sums * min(scale**2, 2.0**120)).astype(np.float32), a, b)
    if scale < 2.0**-63:
        assert (expected == 0).any()
    if scale == 2.0**64:
        assert np.isinf(expected).any()


def test_subnormal_operands_are_zeros():
    one = np.ones((16, 16, 2))
    small = np.full((16, 32), 2.0**-127)  # in bfloat16, too
    assert (check(np.full((16, 16), 3.0), small, one * 2.0**100) == 3.0).all()
    sums = np.full((16, 16), 2.0**-140)
    assert not check(sums, np.zeros((16, 32)), one).any()
    negative = check(-sums, np.full((16, 32), -0.0), one)
    assert not negative.any()


def test_zeros_keep_their_signs():
    a, b = np.zeros((16, 32)), np.ones((16, 16, 2))
    a[::2] = -0.0
    b[:, ::2] = -1.0
    sums = np.where(np.arange(16)[:, None] % 3 == 0, -0.0, 0.0) * np.ones(16)
    check(sums, a, b)
    tiny = a.copy()
    tiny[:, 0], tiny[:, 1] = -(2.0**-100), -(2.0**-100)
    signs = np.signbit(check(sums, tiny, np.abs(b) * 2.0**-100))
    assert signs[0].all()  # flushed to -0, and added to it


def test_tiny_is_what_is_below_after_rounding_without_a_lowest_exponent():
    """Between 2^-126 - 2^-150 and 2^-126, which are neighbours in float32 with its subnormals."""
    a, b = np.zeros((16, 32)), np.zeros((16, 16, 2))
    a[:, 0], b[0, :, 0] = 2.0**-126, 1.0
    taken = 2.0 ** -np.arange(140.0, 156.0)
    a[:, 2] = -taken * 2.0**60
    b[1, :, 0] = 2.0**-60
    expected = check(np.zeros((16, 16)), a, b)[:, 0]
    assert expected[-1] == 2.0**-126
    assert expected[10] == 0  # 2^-126 - 2^-150, rounded up in float32
    assert (expected[11:] == 2.0**-126).all()
    check(np.zeros((16, 16)), -a, b)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_spreads_as_in_sums(value):
    sums, a, b = operands()
    a[3, 5] = value
    b[7, 2, 1] = value
    sums[9, 9] = value
    expected = check(sums, a, b)
    assert not np.isfinite(expected[3]).any()
    assert not np.isfinite(expected[:, 2]).any()
    assert np.isfinite(expected[4, 3:]).all()
    b[2, :, 1] = 0.0  # an infinity times zero
    assert np.isnan(check(sums, a, b)[3]).all()


def test_strides_between_rows():
    sums, a, b = operands()
    whole = np.zeros((16, 50), dtype=np.float32)
    whole[:, 3:19] = sums
    wide_a, wide_b = np.zeros((16, 3, 32), np.uint16), np.zeros((16, 5, 32), np.uint16)
    wide_a[:, 1], wide_b[:, 2] = bfloat16(a), bfloat16(b).reshape(16, 32)
    held = [
        torch.from_numpy(whole),
        *(torch.from_numpy(w.view(np.int16)) for w in (wide_a, wide_b)),
    ]
    skipped = (3 * 4, 64, 2 * 64)
    expected = product(sums, a, b, LEVELS[-1])
    arrays = [array("tile", t, tuple(t.shape), t.dtype) for t in held]
    parts = [(at + skip, size - skip) for (at, size), skip in zip(arrays, skipped, strict=True)]
    _C.tile_product(*parts, (50, 48, 80), -1)
    assert np.array_equal(whole[:, 3:19], expected)
    assert not whole[:, :3].any()
    assert not whole[:, 19:].any()

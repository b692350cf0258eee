"""Elementary functions in float32, with the formulas of csrc/include/ncsn_fast/elementary.h.

Polynomials are minimax fits in relative error, coefficients highest power first. With one rounding
per `tl.fma` they are bit-identical to the C++ functions; Triton's interpreter also rounds the
product, and stays within an ulp or two of that.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _constants(*values: str) -> tl.constexpr:
    return tl.constexpr(tuple(float.fromhex(value) for value in values))


def _constant(value: str) -> tl.constexpr:
    return tl.constexpr(float.fromhex(value))


_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_LN2 = _constant("0x1.62e430p-1")
_LOG1P = _constants(
    "-0x1.38ddc4p-4", "0x1.056c4ep-3", "-0x1.0d8528p-3", "0x1.22d78ep-3", "-0x1.54720ep-3",
    "0x1.99a028p-3", "-0x1.000228p-2", "0x1.555554p-2", "-0x1.0p-1",
)  # fmt: skip

_HALF_PI = _constant("0x1.921fb6p+0")
_SINE = _constants("-0x1.2db5a6p-8", "0x1.465facp-4", "-0x1.4abbbep-1", "-0x1.777a5cp-25")
_COSINE = _constants(
    "0x1.d4f7eep-11", "-0x1.55b2b6p-6", "0x1.03c1b0p-2", "-0x1.3bd3ccp+0", "0x1.0p+0"
)

_LOG2_E = _constant("0x1.715476p+0")
_MINUS_LN2_HIGH, _MINUS_LN2_LOW = _constant("-0x1.62e400p-1"), _constant("-0x1.7f7d1cp-20")
_ROUND_TO_INTEGER = _constant("0x1.8p23")
_NORMAL_TAIL = _constants(
    "-0x1.51e5f2p-6", "0x1.cc8a6cp-4", "-0x1.d362f8p-3", "0x1.88c80ep-3", "-0x1.455460p-4",
    "0x1.89dd36p-4", "0x1.411504p-4", "0x1.c38652p-4", "0x1.e9c420p-4", "0x1.ea3c98p-4",
)  # fmt: skip
_TAIL_SLOPE = _constant("0x1.333334p-2")
_TWICE_ROOT, _CUBIC = _constant("0x1.988454p+0"), _constant("0x1.2444f2p-4")
_EXPM1 = _constants(
    "0x1.9e6f44p-13", "0x1.6d3a3cp-10", "0x1.1112dap-7", "0x1.5554f8p-5", "0x1.555554p-3",
    "0x1.0p-1",
)  # fmt: skip


@triton.jit
def _polynomial(x, coefficients: tl.constexpr, DEGREE: tl.constexpr):
    p = tl.fma(x, coefficients[0], coefficients[1])
    for i in tl.static_range(2, DEGREE + 1):
        p = tl.fma(p, x, coefficients[i])
    return p


@triton.jit
def natural_log(x):
    """Computes ln(x) for normal x > 0, to about 1 ulp."""
    # x = 2^e (1 + m) with 1 + m in [sqrt(1/2), sqrt(2))
    offset = x.to(tl.int32, bitcast=True) - _SQRT_HALF_BITS
    exponent = (offset >> 23).to(tl.float32)
    m = ((offset & 0x007FFFFF) + _SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    log1p = tl.fma(m * m, _polynomial(m, _LOG1P, 8), m)
    return tl.fma(exponent, _LN2, log1p)


@triton.jit
def sine_quarter_turns(t):
    """Computes the sine of t quarter turns, |t| <= 1/2, to about 1 ulp; exact at 0."""
    return tl.fma(t, _HALF_PI, t * _polynomial(t * t, _SINE, 3))


@triton.jit
def cosine_quarter_turns(t):
    """Computes the cosine of t quarter turns, |t| <= 1/2, to about 1 ulp; exact at 0."""
    return _polynomial(t * t, _COSINE, 4)


@triton.jit
def _exp_parts(x):
    """Returns p, s with exp(x) = p (1 + s), for x in [-87, 0]."""
    shifted = tl.fma(x, _LOG2_E, _ROUND_TO_INTEGER)
    n = shifted - _ROUND_TO_INTEGER
    r = tl.fma(n, _MINUS_LN2_LOW, tl.fma(n, _MINUS_LN2_HIGH, x))
    small = tl.fma(r * r, _polynomial(r, _EXPM1, 5), r)
    power = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    return power, small


@triton.jit
def expm1_nonpositive(x):
    """Computes exp(x) - 1 for x <= 0, to about 1 ulp; -1 far below zero, NaN for NaN."""
    power, small = _exp_parts(tl.where(x < -32.0, -32.0, x))
    return tl.fma(power, small, power - 1.0)


@triton.jit
def exp_nonpositive(x):
    """Computes exp(x) for x <= 0, to about 1 ulp; 0 below -87, NaN for NaN."""
    power, small = _exp_parts(tl.where(x < -87.0, -87.0, x))
    return tl.where(x < -87.0, 0.0, tl.fma(power, small, power))


@triton.jit
def elu(x, NARROW: tl.constexpr):
    """Computes ELU: x for x > 0, exp(x) - 1 otherwise; NaN for NaN.

    NARROW: the result will be rounded to 16 bits, so a relative error of 2^-15 suffices: one
    special-function instruction instead of twelve multiply-adds, which would limit the speed.
    """
    if NARROW:
        near_zero = tl.fma(x * x, 0.5, x)
        negative = tl.where(x > -0.0078125, near_zero, tl.exp(x) - 1.0)
    else:
        negative = expm1_nonpositive(x)
    return tl.where(x > 0.0, x, negative)


@triton.jit
def times_sigmoid(factor, x, NARROW: tl.constexpr):
    """Computes factor * sigmoid(x). NARROW: see `elu`."""
    if NARROW:
        y = factor / (1.0 + tl.exp(-x))
    else:
        t = exp_nonpositive(tl.where(x < 0.0, x, -x))
        y = tl.div_rn(factor * tl.where(x < 0.0, t, 1.0), 1.0 + t)
    return y


@triton.jit
def tanh(x):
    """Computes tanh(x), to about 2 ulp."""
    t = expm1_nonpositive(tl.where(x < 0.0, 2.0 * x, -2.0 * x))
    y = tl.div_rn(t, 2.0 + t)
    return tl.where(x < 0.0, y, 0.0 - y)


@triton.jit
def gelu(x):
    """Computes x Phi(x), Phi the normal distribution function, to 2^-20."""
    a = tl.where(x < 0.0, -x, x)
    a = tl.where(a < 14.0, a, 14.0)
    t = tl.div_rn(1.0, tl.fma(a, _TAIL_SLOPE, 1.0))
    tail = t * _polynomial(t, _NORMAL_TAIL, 9)
    square = a * a
    rest = tl.fma(a, a, -square)
    exponential = exp_nonpositive(-0.5 * square)
    tail = tl.fma(exponential, -0.5 * rest, exponential) * tail
    return tl.where(x > 0.0, tl.fma(-x, tail, x), x * tail)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, NARROW: tl.constexpr):
    """Computes an activation by its name in `ncsn_fast.ops.activations`. NARROW: see `elu`."""
    if ACTIVATION == "none":
        y = x
    elif ACTIVATION == "elu":
        y = elu(x, NARROW)
    elif ACTIVATION == "relu":
        y = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "silu":
        y = times_sigmoid(x, x, NARROW)
    elif ACTIVATION == "sigmoid":
        y = times_sigmoid(1.0, x, NARROW)
    elif ACTIVATION == "tanh":
        y = tanh(x)
    elif ACTIVATION == "gelu":
        y = gelu(x)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh", "the launcher checks the name")
        y = times_sigmoid(x, x * tl.fma(x * x, _CUBIC, _TWICE_ROOT), NARROW)
    return y

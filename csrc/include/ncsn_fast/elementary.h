// Elementary functions in float32, branch-free so that compilers vectorise loops over them.
//
// Polynomials are minimax fits in relative error with coefficients rounded one by one to float32; the
// figure beside each is the remaining error of the fit. Every operation is an IEEE one, so all
// instruction sets and the GPU give the same bits wherever their square root is correctly rounded.
#pragma once

#include "ncsn_fast/platform.h"

namespace ncsn_fast {

// Adding it rounds a float below 2^22 in magnitude to an integer, left in the low mantissa bits.
constexpr float kRoundToInteger = 0x1.8p23f;

// ln(x) for normal x > 0, about 1 ulp.
NCSN_HD float natural_log(float x) {
    // x = 2^e (1 + m) with 1 + m in [sqrt(1/2), sqrt(2)).
    constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
    constexpr float kLn2 = 0x1.62e430p-1f;
    const uint32_t offset = float_bits(x) - kSqrtHalf;
    const int32_t exponent = static_cast<int32_t>(offset) >> 23;
    const float m = bits_float((offset & 0x007fffffu) + kSqrtHalf) - 1.0f;
    float p = -0x1.38ddc4p-4f;  // log1p(m) = m + m^2 (-1/2 + m p(m)), 2^-27
    p = fused(p, m, 0x1.056c4ep-3f);
    p = fused(p, m, -0x1.0d8528p-3f);
    p = fused(p, m, 0x1.22d78ep-3f);
    p = fused(p, m, -0x1.54720ep-3f);
    p = fused(p, m, 0x1.99a028p-3f);
    p = fused(p, m, -0x1.000228p-2f);
    p = fused(p, m, 0x1.555554p-2f);
    p = fused(p, m, -0.5f);
    const float log1p = fused(m * m, p, m);
    return fused(static_cast<float>(exponent), kLn2, log1p);
}

struct SinCos {
    float sin, cos;
};

// Sine and cosine of t quarter turns, |t| <= 1/2, about 1 ulp; exact at 0.
NCSN_HD SinCos sincos_quarter_turns(float t) {
    constexpr float kHalfPi = 0x1.921fb6p+0f;
    constexpr float kHalfPiRest = -0x1.777a5cp-25f;
    const float s = t * t;
    float p = -0x1.2db5a6p-8f;  // sin = t (pi/2 + s p(s)), 2^-28
    p = fused(p, s, 0x1.465facp-4f);
    p = fused(p, s, -0x1.4abbbep-1f);
    float q = 0x1.d4f7eep-11f;  // cos = 1 + s q(s), 2^-31
    q = fused(q, s, -0x1.55b2b6p-6f);
    q = fused(q, s, 0x1.03c1b0p-2f);
    q = fused(q, s, -0x1.3bd3ccp+0f);
    return {fused(t, kHalfPi, t * fused(p, s, kHalfPiRest)), fused(q, s, 1.0f)};
}

// exp(x) = power (1 + small), |small| < 0.42, for x in [-87, 0].
struct ExpParts {
    float power, small;
};

NCSN_HD ExpParts exp_parts(float x) {
    constexpr float kLog2E = 0x1.715476p+0f;
    constexpr float kLn2High = 0x1.62e400p-1f;
    constexpr float kLn2Low = 0x1.7f7d1cp-20f;
    const float shifted = fused(x, kLog2E, kRoundToInteger);
    const float n = shifted - kRoundToInteger;
    const float r = fused(n, -kLn2Low, fused(n, -kLn2High, x));
    float p = 0x1.9e6f44p-13f;  // expm1(r) = r + r^2 p(r), |r| <= ln(2)/2, 2^-31
    p = fused(p, r, 0x1.6d3a3cp-10f);
    p = fused(p, r, 0x1.1112dap-7f);
    p = fused(p, r, 0x1.5554f8p-5f);
    p = fused(p, r, 0x1.555554p-3f);
    p = fused(p, r, 0.5f);
    const float power = bits_float((float_bits(shifted) << 23) + 0x3f800000u);  // 2^n
    return {power, fused(r * r, p, r)};
}

// exp(x) - 1 for x <= 0, about 1 ulp relative; -1 far below zero, NaN for NaN.
NCSN_HD float expm1_nonpositive(float x) {
    const ExpParts e = exp_parts(x < -32.0f ? -32.0f : x);  // below -18 the result rounds to -1
    return fused(e.power, e.small, e.power - 1.0f);
}

// exp(x) for x <= 0, about 1 ulp; 0 below -87, NaN for NaN.
NCSN_HD float exp_nonpositive(float x) {
    const ExpParts e = exp_parts(x < -87.0f ? -87.0f : x);
    return x < -87.0f ? 0.0f : fused(e.power, e.small, e.power);
}

// exp(x), for |x| up to 1 to about 2^-21 relative on a GPU: two instructions. Results below 2^-126 are 0.
NCSN_HD float fast_exp(float x) {
#if defined(__CUDA_ARCH__)
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x * 0x1.715476p+0f));  // log2(e)
    return out;
#else
    return __builtin_expf(x);
#endif
}

// Like elu_of, for results that will be rounded to 16 bits: relative error at most 2^-14.
NCSN_HD float elu_narrow(float x) {
    const float negative = x > -0x1p-7f ? fused(x * x, 0.5f, x) : fast_exp(x) - 1.0f;
    return x > 0.0f ? x : negative;
}

// x for x > 0, exp(x) - 1 otherwise.
NCSN_HD float elu_of(float x) {
    const float negative = expm1_nonpositive(x);
    return x > 0.0f ? x : negative;
}

}  // namespace ncsn_fast

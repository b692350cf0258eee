// Activations. Errors, relative to the exact function of a float32, are below 2^-22; gelu's are below
// 2^-20, and left of zero gelu_tanh's, whose argument is a cubic, below 2^-16. Results below 2^-115 may be 0.
#pragma once

#include "ncsn_fast/elementary.h"

namespace ncsn_fast {

// The names and numbers of ncsn_fast.ops.activations.
enum class Activation : int32_t {
    kNone = 0,
    kElu = 1,       // x for x > 0, exp(x) - 1 otherwise
    kRelu = 2,      // max(x, 0)
    kSilu = 3,      // x sigmoid(x)
    kSigmoid = 4,   // 1 / (1 + exp(-x))
    kTanh = 5,
    kGelu = 6,      // x Phi(x), Phi the normal distribution function
    kGeluTanh = 7,  // x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
};

constexpr int32_t kActivations = 8;

NCSN_HD float magnitude_of(float x) { return x < 0.0f ? -x : x; }

// factor * sigmoid(x).
NCSN_HD float times_sigmoid(float factor, float x) {
    const float t = exp_nonpositive(-magnitude_of(x));
    return factor * (x < 0.0f ? t : 1.0f) / (1.0f + t);
}

// x sigmoid(x), for results that will be rounded to 16 bits: relative error at most 2^-14; 0 far below
// zero.
NCSN_HD float silu_narrow(float x) {
#if defined(__CUDA_ARCH__)
    return __fdividef(x, 1.0f + fast_exp(-x));
#else
    return x / (1.0f + fast_exp(-x));
#endif
}

NCSN_HD float tanh_of(float x) {
    const float t = expm1_nonpositive(-2.0f * magnitude_of(x));
    const float y = t / (2.0f + t);
    return x < 0.0f ? y : 0.0f - y;
}

// 1 - Phi(a) for a in [0, 14], 2^-20 relative.
NCSN_HD float normal_tail(float a) {
    const float t = 1.0f / fused(0x1.333334p-2f, a, 1.0f);
    float p = -0x1.51e5f2p-6f;  // exp(a^2 / 2) (1 - Phi(a)) = t p(t), t = 1 / (1 + 0.3 a), 2^-28
    p = fused(p, t, 0x1.cc8a6cp-4f);
    p = fused(p, t, -0x1.d362f8p-3f);
    p = fused(p, t, 0x1.88c80ep-3f);
    p = fused(p, t, -0x1.455460p-4f);
    p = fused(p, t, 0x1.89dd36p-4f);
    p = fused(p, t, 0x1.411504p-4f);
    p = fused(p, t, 0x1.c38652p-4f);
    p = fused(p, t, 0x1.e9c420p-4f);
    p = fused(p, t, 0x1.ea3c98p-4f);
    const float square = a * a, rest = fused(a, a, -square);
    const float exponential = exp_nonpositive(-0.5f * square);
    return fused(exponential, -0.5f * rest, exponential) * (t * p);
}

NCSN_HD float gelu_of(float x) {
    const float a = magnitude_of(x);
    const float tail = normal_tail(a < 14.0f ? a : 14.0f);
    return x > 0.0f ? fused(-x, tail, x) : x * tail;
}

constexpr float kGeluTwice = 0x1.988454p+0f;  // 2 sqrt(2 / pi)
constexpr float kGeluCubic = 0x1.2444f2p-4f;  // 0.044715 times that

NCSN_HD float gelu_tanh_of(float x) { return times_sigmoid(x, x * fused(kGeluCubic, x * x, kGeluTwice)); }

template <Activation activation>
NCSN_HD float activated(float x) {
    if constexpr (activation == Activation::kElu) return elu_of(x);
    if constexpr (activation == Activation::kRelu) return x < 0.0f ? 0.0f : x;
    if constexpr (activation == Activation::kSilu) return times_sigmoid(x, x);
    if constexpr (activation == Activation::kSigmoid) return times_sigmoid(1.0f, x);
    if constexpr (activation == Activation::kTanh) return tanh_of(x);
    if constexpr (activation == Activation::kGelu) return gelu_of(x);
    if constexpr (activation == Activation::kGeluTanh) return gelu_tanh_of(x);
    return x;
}

// Like activated, for results that will be rounded to 16 bits, where narrow.
template <Activation activation, bool narrow>
NCSN_HD float activated_as(float x) {
    if constexpr (narrow && activation == Activation::kElu) return elu_narrow(x);
    if constexpr (narrow && activation == Activation::kSilu) return silu_narrow(x);
    return activated<activation>(x);
}

// The derivative, with an error below 2^-20 of the largest derivative.
template <Activation activation>
NCSN_HD float derivative(float x) {
    const float a = magnitude_of(x);
    if constexpr (activation == Activation::kElu) {
        const float negative = exp_nonpositive(x);
        return x > 0.0f ? 1.0f : negative;
    }
    if constexpr (activation == Activation::kRelu) return x <= 0.0f ? 0.0f : 1.0f;
    if constexpr (activation == Activation::kSilu || activation == Activation::kSigmoid ||
                  activation == Activation::kTanh) {
        const float t = exp_nonpositive(activation == Activation::kTanh ? -2.0f * a : -a);
        const float inverse = 1.0f / (1.0f + t), falls = t * inverse * inverse;  // sigmoid (1 - sigmoid)
        if constexpr (activation == Activation::kSigmoid) return falls;
        if constexpr (activation == Activation::kTanh) return 4.0f * falls;
        return fused(x, falls, (x < 0.0f ? t : 1.0f) * inverse);
    }
    if constexpr (activation == Activation::kGelu) {
        constexpr float kDensity = 0x1.988454p-2f;  // 1 / sqrt(2 pi)
        const float near = a < 14.0f ? a : 14.0f, tail = normal_tail(near);
        const float density = kDensity * exp_nonpositive(-0.5f * near * near);
        return fused(x, density, x > 0.0f ? 1.0f - tail : tail);
    }
    if constexpr (activation == Activation::kGeluTanh) {
        const float near = a < 14.0f ? a : 14.0f;
        const float square = near * near, w = near * fused(kGeluCubic, square, kGeluTwice);
        const float t = exp_nonpositive(-w), inverse = 1.0f / (1.0f + t);
        const float rises = t * inverse * inverse * fused(3.0f * kGeluCubic, square, kGeluTwice);
        return fused(x < 0.0f ? -near : near, rises, (x < 0.0f ? t : 1.0f) * inverse);
    }
    return 1.0f;
}

// As norms apply it: centred first, because scale * x + shift cancels badly where the mean is large.
template <Activation activation>
NCSN_HD float normalised(float x, float mean, float scale, float shift) {
    return activated<activation>(fused(x - mean, scale, shift));
}

template <Activation value>
struct Activating {};

// run(Activating<activation>{}), for an activation known only at run time.
template <class Run>
NCSN_HD void with_activation(Activation activation, Run run) {
    switch (activation) {
        case Activation::kNone:
            return run(Activating<Activation::kNone>{});
        case Activation::kElu:
            return run(Activating<Activation::kElu>{});
        case Activation::kRelu:
            return run(Activating<Activation::kRelu>{});
        case Activation::kSilu:
            return run(Activating<Activation::kSilu>{});
        case Activation::kSigmoid:
            return run(Activating<Activation::kSigmoid>{});
        case Activation::kTanh:
            return run(Activating<Activation::kTanh>{});
        case Activation::kGelu:
            return run(Activating<Activation::kGelu>{});
        case Activation::kGeluTanh:
            return run(Activating<Activation::kGeluTanh>{});
    }
}

}  // namespace ncsn_fast

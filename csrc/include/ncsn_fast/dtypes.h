// Element types of the kernels: float32; bfloat16, the upper half of a float32; IEEE float16.
#pragma once

#include "ncsn_fast/platform.h"

namespace ncsn_fast {

enum class Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

struct Bfloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

NCSN_HD float to_float(float x) { return x; }

NCSN_HD float to_float(Bfloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

NCSN_HD float to_float(Float16 x) {
#if defined(__CUDA_ARCH__)
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
    return out;
#else
    const uint32_t magnitude = x.bits & 0x7fffu, shifted = magnitude << 13;
    const uint32_t rebias = magnitude >= 0x7c00u ? 224u << 23 : 112u << 23;  // 31 becomes 255
    const uint32_t subnormal = float_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    const uint32_t value = magnitude < 0x0400u ? subnormal : shifted + rebias;
    return bits_float(value | static_cast<uint32_t>(x.bits & 0x8000u) << 16);
#endif
}

// Round to nearest, ties to even. A NaN becomes the quiet NaN 0x7fc0, as in PyTorch.
NCSN_HD Bfloat16 to_bfloat16(float x) {
    const uint32_t u = float_bits(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
}

// Round to nearest, ties to even. A NaN becomes the quiet NaN 0x7e00.
NCSN_HD Float16 to_float16(float x) {
#if defined(__CUDA_ARCH__)
    uint16_t rounded;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
    return {static_cast<uint16_t>(x == x ? rounded : 0x7e00u)};
#else
    const uint32_t u = float_bits(x), magnitude = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
    // Below 2^-14 the spacing is 2^-24, which is that of floats in [1/2, 1).
    const uint32_t small = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t finite = magnitude < 0x38800000u ? small : normal;
    const uint32_t rounded = magnitude >= 0x477ff000u ? 0x7c00u : finite;  // from 65520 on: infinity
    return {static_cast<uint16_t>(x == x ? sign | rounded : 0x7e00u)};
#endif
}

NCSN_HD void store(float* to, float x) { *to = x; }

NCSN_HD void store(Bfloat16* to, float x) { *to = to_bfloat16(x); }

NCSN_HD void store(Float16* to, float x) { *to = to_float16(x); }

// Converts two floats to the bits of two elements of the first argument's type; a NaN becomes any NaN.
NCSN_HD uint32_t pair_bits(Bfloat16, float low, float high) {
#if defined(__CUDA_ARCH__)
    uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
#else
    return to_bfloat16(low).bits | static_cast<uint32_t>(to_bfloat16(high).bits) << 16;
#endif
}

NCSN_HD uint32_t pair_bits(Float16, float low, float high) {
#if defined(__CUDA_ARCH__)
    uint32_t out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
#else
    return to_float16(low).bits | static_cast<uint32_t>(to_float16(high).bits) << 16;
#endif
}

// Element i of an array whose dtype is known only at run time.
NCSN_HD float load_as(Dtype dtype, const void* from, int64_t i) {
    if (dtype == Dtype::kFloat32) return static_cast<const float*>(from)[i];
    if (dtype == Dtype::kBfloat16) return to_float(static_cast<const Bfloat16*>(from)[i]);
    return to_float(static_cast<const Float16*>(from)[i]);
}

NCSN_HD void store_as(Dtype dtype, void* to, int64_t i, float x) {
    if (dtype == Dtype::kFloat32) {
        store(static_cast<float*>(to) + i, x);
    } else if (dtype == Dtype::kBfloat16) {
        store(static_cast<Bfloat16*>(to) + i, x);
    } else {
        store(static_cast<Float16*>(to) + i, x);
    }
}

}  // namespace ncsn_fast

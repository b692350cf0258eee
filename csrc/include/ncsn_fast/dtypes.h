// Element types of the kernels: float32 and bfloat16, the latter as the upper half of a float32.
#pragma once

#include "ncsn_fast/platform.h"

namespace ncsn_fast {

enum class Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1 };

struct Bfloat16 {
    uint16_t bits;
};

NCSN_HD float to_float(float x) { return x; }

NCSN_HD float to_float(Bfloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

// Round to nearest, ties to even. A NaN becomes the quiet NaN 0x7fc0, as in PyTorch.
NCSN_HD Bfloat16 to_bfloat16(float x) {
    const uint32_t u = float_bits(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
}

NCSN_HD void store(float* to, float x) { *to = x; }

NCSN_HD void store(Bfloat16* to, float x) { *to = to_bfloat16(x); }

}  // namespace ncsn_fast

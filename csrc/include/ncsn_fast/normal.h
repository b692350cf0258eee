// Box-Muller: two standard normals from two words (|z| <= 5.77).
//
//   u1 = ((w_even >> 8) + 1) 2^-24,   u2 = (w_odd >> 8) 2^-24,   r = sqrt(-2 ln u1)
//   z  = (r cos 2 pi u2, r sin 2 pi u2)
#pragma once

#include "ncsn_fast/elementary.h"

namespace ncsn_fast {

struct NormalPair {
    float first, second;
};

NCSN_HD NormalPair box_muller(uint32_t w_even, uint32_t w_odd) {
    const int32_t k1 = static_cast<int32_t>(w_even >> 8) + 1;
    const float radius = square_root(-2.0f * natural_log(static_cast<float>(k1) * 0x1p-24f));
    // 2 pi u2 is `quadrant` + t quarter turns, |t| <= 1/2; integer arithmetic makes this exact.
    const int32_t k2 = static_cast<int32_t>(w_odd >> 8);
    const int32_t quadrant = (k2 + (1 << 21)) >> 22;
    const float t = static_cast<float>(k2 - (quadrant << 22)) * 0x1p-22f;
    const SinCos a = sincos_quarter_turns(t);
    const bool swap = (quadrant & 1) != 0;
    const float cosine = swap ? a.sin : a.cos;
    const float sine = swap ? a.cos : a.sin;
    const uint32_t cos_sign = static_cast<uint32_t>((quadrant + 1) & 2) << 30;
    const uint32_t sin_sign = static_cast<uint32_t>(quadrant & 2) << 30;
    return {radius * bits_float(float_bits(cosine) ^ cos_sign),
            radius * bits_float(float_bits(sine) ^ sin_sign)};
}

}  // namespace ncsn_fast

// One row of a sampler table on one element:
//
//   x' = a x + b f + g h + c z        h' = p x + q f
//   then, where an element is known:  x' = known + c_ref z_ref
//
// State and arithmetic are float32; each product-sum is fused in this fixed order on every backend.
#pragma once

#include <cstdint>

#include "ncsn_fast/dtypes.h"

namespace ncsn_fast {

// Streams of the noise contract that an update draws from.
constexpr uint32_t kSamplerStream = 0;
constexpr uint32_t kReferenceStream = 2;
constexpr uint32_t kSecondStream = 3;

struct Row {
    float a, b, g, c, p, q;
    float c_ref;  // NaN: known elements are left alone
    uint32_t step, ref_step;
};

struct UpdateArgs {
    // Sizes: x and h are (batch, channels, plane) float32, contiguous, updated in place.
    int64_t batch, channels, plane;
    float* x;
    float* h;  // null: no history
    const void* f;
    Dtype f_dtype;
    bool f_channels_last;
    uint32_t seed;
    const int64_t* samples;      // (batch,), values below 2^32
    const float* noise_weights;  // (batch, 2) or null
    const uint8_t* mask;         // null: nothing is known
    const float* known;
    Row row;
    // scale * x' + shift, the network's next input; null: not wanted.
    void* net_input;
    Dtype net_dtype;
    bool net_channels_last;
    float scale, shift;
    int32_t* nonfinite;  // (batch,) or null; set to 1 where a sample's new state is not finite
};

NCSN_HD float updated_state(const Row& row, float x, float f) { return fused(row.b, f, row.a * x); }

NCSN_HD float updated_history(const Row& row, float x, float f) { return fused(row.q, f, row.p * x); }

// x - x is 0 for finite x and NaN otherwise.
NCSN_HD bool is_nonfinite(float x) { return !(x - x == 0.0f); }

// Position of element `e` (C, H, W order) in memory.
NCSN_HD int64_t offset_of(int64_t e, int64_t channels, int64_t plane, bool channels_last) {
    return channels_last ? (e % plane) * channels + e / plane : e;
}

}  // namespace ncsn_fast

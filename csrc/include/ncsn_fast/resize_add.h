// Bilinear resize of a channels-last map with aligned corners, added to another map or alone:
//
//   y[i, j] = a[i, j] + x at (i (h - 1) / (H - 1), j (w - 1) / (W - 1))
#pragma once

#include "ncsn_fast/dtypes.h"

namespace ncsn_fast {

struct ResizeArgs {
    int64_t batch, channels;
    int64_t in_height, in_width, out_height, out_width;
    const void* x;
    const void* a;  // null: nothing is added
    void* y;        // may be a, not x
    Dtype dtype;
};

// Source of an output position between two input positions: (1 - weight) low + weight high.
struct Source {
    int64_t low, high;
    float weight;
};

// Computed in integers, so that a position that falls on an input position is exact.
NCSN_HD Source source_of(int64_t position, int64_t in, int64_t out) {
    if (out == 1) return {0, 0, 0.0f};
    const int64_t span = out - 1, at = position * (in - 1);
    const int64_t low = at / span, rest = at % span;
    return {low, rest == 0 ? low : low + 1, static_cast<float>(rest) / static_cast<float>(span)};
}

// V: float or a vector of floats.
template <class V>
NCSN_HD V between(V low, V high, float weight) {
    return low + (high - low) * weight;
}

}  // namespace ncsn_fast

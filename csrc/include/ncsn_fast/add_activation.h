// Activation of a map, or of the weighted sum of two:
//
//   s = a_weight a + b_weight b,   y = activation(s)
//
// The sum is float32; y is computed from it before it is rounded to the dtype of the maps.
#pragma once

#include "ncsn_fast/activation.h"
#include "ncsn_fast/dtypes.h"
#include "ncsn_fast/padded_map.h"

namespace ncsn_fast {

// All maps have one type; sum and y may be a or b. Where `channels` is 0, all are dense and alike. Else a and b are
// dense channels-last maps, and what is written may lie otherwise, and is neither a nor b then.
struct AddActivationArgs {
    int64_t count, channels;
    const void* a;
    const void* b;  // null: nothing is added
    void* sum;      // null: not wanted
    void* y;        // null: not wanted
    Dtype dtype;
    Activation activation;
    float a_weight, b_weight;
    PixelLayout sum_pixels, y_pixels;
};

}  // namespace ncsn_fast

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

// All maps have one type and one layout, but a padded y; sum and y may be a or b.
struct AddActivationArgs {
    int64_t count;
    const void* a;
    const void* b;  // null: nothing is added
    void* sum;      // null: not wanted
    void* y;        // null: not wanted
    Dtype dtype;
    Activation activation;
    float a_weight, b_weight;
    int64_t channels;      // 0: y is as dense as the others; else these are of channels-last maps,
    PixelLayout y_pixels;  // and y has zeros around it
};

}  // namespace ncsn_fast

// Activation of a map, or of the weighted sum of two:
//
//   s = a_weight a + b_weight b,   y = activation(s)
//
// The sum is float32; y is computed from it before it is rounded to the dtype of the maps.
#pragma once

#include "ncsn_fast/activation.h"
#include "ncsn_fast/dtypes.h"

namespace ncsn_fast {

// All maps have one type and one layout; sum and y may be a or b. What is written may have gaps behind every
// `channels` elements: these then begin `row` apart, and it is neither a nor b.
struct AddActivationArgs {
    int64_t count, channels, row;
    const void* a;
    const void* b;  // null: nothing is added
    void* sum;      // null: not wanted
    void* y;        // null: not wanted
    Dtype dtype;
    Activation activation;
    float a_weight, b_weight;
};

}  // namespace ncsn_fast

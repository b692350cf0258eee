// ELU (alpha 1) of a map, or of the sum of two:
//
//   s = a + b,   y = elu(s)
//
// The sum is float32; y is computed from it before it is rounded to the dtype of the maps.
#pragma once

#include "ncsn_fast/dtypes.h"
#include "ncsn_fast/elementary.h"

namespace ncsn_fast {

// All maps have one type and one layout; sum and y may be a or b.
struct AddEluArgs {
    int64_t count;
    const void* a;
    const void* b;  // null: nothing is added
    void* sum;      // null: not wanted
    void* y;        // null: not wanted
    Dtype dtype;
};

}  // namespace ncsn_fast

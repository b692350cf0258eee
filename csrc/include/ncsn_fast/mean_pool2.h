// Mean of each 2x2 square of a channels-last map of even height and width, or of the sum of two:
//
//   y = (s00 + s01 + s10 + s11) / 4,   s = a or a + b
#pragma once

#include "ncsn_fast/dtypes.h"

namespace ncsn_fast {

struct MeanPoolArgs {
    int64_t batch, height, width, channels;  // of a and b
    const void* a;
    const void* b;  // null: nothing is added
    void* y;        // (batch, height / 2, width / 2, channels); neither a nor b
    Dtype dtype;
};

// V: float or a vector of floats.
template <class V>
NCSN_HD V mean_of_square(V s00, V s01, V s10, V s11) {
    return ((s00 + s01) + (s10 + s11)) * 0.25f;
}

}  // namespace ncsn_fast

// Softmax of each row of a matrix, in place:
//
//   x_ij = exp(scale x_ij) / sum_k exp(scale x_ik)
#pragma once

#include "ncsn_fast/dtypes.h"

namespace ncsn_fast {

struct SoftmaxArgs {
    int64_t rows, columns;
    void* x;
    float scale;
    Dtype dtype;
};

}  // namespace ncsn_fast

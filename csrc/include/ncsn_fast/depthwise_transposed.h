// Transposed convolution of each channel of a channels-last map with a kernel of its own, such as the
// doubling of a map by a filter:
//
//   y[i, j] = bias + sum over k, l of weight[k, l] x[a, b],  i + padding = stride a + k,
//                                                            j + padding = stride b + l
#pragma once

#include "ncsn_fast/dtypes.h"

namespace ncsn_fast {

struct DepthwiseTransposedArgs {
    int64_t batch, height, width, channels;  // of x
    int64_t out_height, out_width;
    int64_t taps, stride, padding;
    const void* x;
    const float* weight;  // (taps, taps, channels)
    const float* bias;    // (channels,), or null
    void* y;              // not x
    Dtype dtype;
};

}  // namespace ncsn_fast

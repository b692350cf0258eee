// Gradients of y = activation(z), z = (x - mean) scale + shift, whose three parameters, one of each for a
// sample and channel, a norm computes from the statistics of x:
//
//   g = grad activation'(z)
//   gradient of x = g scale + (x - mean) slope + offset
//
// The statistics' share is affine in x; its slope and offset follow from the sums of g and g (x - mean) over
// the plane (ncsn_fast.ops.gradients).
#pragma once

#include "ncsn_fast/activation.h"
#include "ncsn_fast/dtypes.h"

namespace ncsn_fast {

// The mean of each channel over its plane, and its biased variance.
struct MomentsArgs {
    int64_t batch, channels, plane;
    const void* x;
    double* moments;  // (batch, 2, channels): means, variances
    bool channels_last;
    Dtype dtype;
};

struct NormGradientArgs {
    int64_t batch, channels, plane;
    const void *x, *grad;  // of one layout and type
    const float* rows;     // (batch, 5, channels): mean, scale, shift, slope, offset; null: 0, 1, 0, 0, 0
    double* sums;          // (batch, 2, channels): of g and of g (x - mean); null: not computed
    void* out;             // gradient of x, like x; null: not computed
    bool channels_last;
    Dtype dtype;
    Activation activation;
};

}  // namespace ncsn_fast

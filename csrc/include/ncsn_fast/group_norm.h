// Group normalisation (Wu & He 2018) of x, or of x + add, modulated and followed by an activation:
//
//   h = x + add,   u = (h - mu) / sqrt(var + eps) gamma + beta,   y = activation(u (1 + scale) + shift)
//   mu, var: mean and biased variance of a group of channels over its plane
//
// add, scale and shift have one value for each sample and channel: a U-Net's time embedding. Applied as
// y = (x - mean) * scale' + shift', as instance normalisation++.
#pragma once

#include "ncsn_fast/activation.h"
#include "ncsn_fast/dtypes.h"

namespace ncsn_fast {

struct GroupNormArgs {
    int64_t batch, channels, plane, groups;  // channels is a multiple of groups
    const void* x;
    void* y;  // layout of x; may be x where the types are equal
    const float *gamma, *beta;          // (channels,); null: 1 and 0
    const float *add, *scale, *shift;   // (batch, channels); null: 0
    bool channels_last;
    Dtype in_dtype, out_dtype;
    Activation activation;
    float eps;
    int64_t y_row;  // channels-last, on the CPU: elements between two pixels of y, `channels` if y is x
};

// y = activation(scale x + shift), with one scale and one shift for each sample and channel.
struct ScaleShiftArgs {
    int64_t batch, channels, plane;
    const void* x;
    void* y;  // layout of x; may be x where the types are equal
    const float *scale, *shift;  // (batch, channels); null: 1 and 0
    bool channels_last;
    Dtype in_dtype, out_dtype;
    Activation activation;
};

}  // namespace ncsn_fast

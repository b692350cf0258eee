// Instance normalisation++ (Song & Ermon 2019, appendix A), optionally followed by ELU:
//
//   y = gamma ((x - mu) / sqrt(var + eps) + alpha (mu - m) / sqrt(v + eps)) + beta
//   mu, var: mean and biased variance of a channel over its plane; m, v: mean and unbiased variance
//   of mu over the channels (v = 0 for a single channel)
//
// applied as y = (x - mean) * scale + shift.
#pragma once

#include <cstdint>

#include "ncsn_fast/activation.h"
#include "ncsn_fast/dtypes.h"

namespace ncsn_fast {

struct NormArgs {
    int64_t batch, channels, plane;
    const void* x;
    void* y;  // layout of x; may be x where the types are equal
    // Parameters and their stride per sample in floats: 0 if all samples share one row.
    const float *alpha, *gamma, *beta;
    int64_t alpha_row, gamma_row, beta_row;
    const float* bias;  // (channels,): normalises x + bias instead of x; null: none
    bool channels_last;
    Dtype in_dtype, out_dtype;
    bool elu;
    float eps;
};

}  // namespace ncsn_fast

// The passes over memory that norms share; what a norm does between them is a function of its own.
//
// Per sample: statistics of each tile (read once from memory, twice from cache), merged in a fixed
// order; then one pass that applies y = activation((x - mean) * scale + shift), whose three parameters
// of each channel `finalise` computes from the statistics. Two reads and one write an element; where a
// sample fits the second-level cache the second read stays there. Bound by memory, or by the activation
// where data is in cache.
//
// A tile's statistics are two-pass: its mean, summed in double, then the float32 sum of squares about
// that mean rounded to float32. So a constant channel gives exactly zero variance, and channel means
// keep the digits that the standardisation over channels needs. Where the convolution before has left
// sums (strip_sums.h), its strips take the place of the tiles, and the first pass is skipped.
//
// Workspace of a sample: mean and sum of squares of each channel in double; mean, scale and shift of
// each channel; then of each tile and channel the mean in double and the sum of squares.
#pragma once

#include "lanes.h"
#include "ncsn_fast/activation.h"

namespace ncsn_fast::NCSN_ISA {

struct NormMaps {
    int64_t batch, channels, plane;
    const void* x;
    void* y;
    bool channels_last;
    Dtype in_dtype, out_dtype;
    Activation activation;
    NormContext context;
};

struct Affine {
    float* mean;
    float* scale;
    float* shift;
};

// Mean of each channel of a sample, and sum of squares about it.
struct ChannelStats {
    double* mean;
    double* squares;
};

// Fills the parameters of sample n; `args` are the norm's own.
using Finalise = void (*)(const void* args, int64_t n, ChannelStats stats, Affine out);

enum class Passes { kBoth, kStatistics, kApply };  // without statistics `stats` are not filled

void run_norm(const NormMaps& maps, const NormPlan& plan, const NormWorkspace& workspace, Passes passes,
              Finalise finalise, const void* args);

}  // namespace ncsn_fast::NCSN_ISA

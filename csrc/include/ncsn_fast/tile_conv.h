// Convolution with 1x1 or 3x3 weights, stride 1, dilation d and as much padding as keeps the size, of
// channels-last bfloat16 maps in tiles (cpu/tile.h), with what follows it:
//
//   s = sum over k, l of w[k, l] x[i + d (k - 1), j + d (l - 1)]   (+ bias)   (+ added),   y = activation(s)
//
// Products of bfloat16s are summed in float32; s is rounded to bfloat16 where it is kept, and y is
// computed from it before that. A sum's order is that of the weights' layout: chunks of 32 input channels,
// and in each the taps. x and y may be maps with zeros around them (padded_map.h); sums for a norm
// (strip_sums.h) are those of the rounded s.
#pragma once

#include "ncsn_fast/activation.h"
#include "ncsn_fast/dtypes.h"
#include "ncsn_fast/padded_map.h"
#include "ncsn_fast/strip_sums.h"

namespace ncsn_fast {

constexpr int kTilePanel = 32;  // output channels that are computed together: two tiles

// Layout of the weights: [panel][chunk][tap][half of the panel][pair of input channels][output channel]
// [channel of the pair]; channels beyond the last are zeros.
struct TileConvSizes {
    int64_t channels, panels;  // padded input channels; panels of output channels
    int64_t values;            // elements

    TileConvSizes(int64_t in_channels, int64_t out_channels, int64_t taps)
        : channels((in_channels + kTileChunk - 1) / kTileChunk * kTileChunk),
          panels((out_channels + kTilePanel - 1) / kTilePanel),
          values(panels * kTilePanel * channels * taps * taps) {}
};

struct TileConvArgs {
    int64_t batch, height, width, in_channels, out_channels;
    int64_t taps, dilation;  // taps a side: 1 or 3
    const Bfloat16* x;
    int64_t border;  // of x, a PaddedMap; -1: x is dense
    const Bfloat16* weights;
    const float* bias;      // (out_channels,); null: none
    const Bfloat16* added;  // null: none
    Bfloat16* sum;          // s; null: not wanted. It may be `added`, and neither may be x.
    float* strip_sums;      // of the sum, which is kept then; null: not wanted
    Bfloat16* y;            // null: not wanted. It may be `added`, not `sum`.
    PixelLayout y_pixels;
    int64_t sum_row;        // elements between two pixels of sum, out_channels if it is `added`
    Activation activation;
};

}  // namespace ncsn_fast

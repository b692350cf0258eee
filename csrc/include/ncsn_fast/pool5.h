// 5x5 pools, stride 1, padding 2, of channels-last maps:
//
//   max: y = the largest of the elements inside the map; a NaN among them gives a NaN
//   average: y = sum / 25; elements outside the map count as zeros
#pragma once

#include "ncsn_fast/dtypes.h"
#include "ncsn_fast/padded_map.h"

namespace ncsn_fast {

enum class PoolKind { kMax, kAverage };

struct PoolArgs {
    int64_t batch, height, width, channels;
    const void* x;
    void* y;  // not x
    PixelLayout y_pixels;
    Dtype dtype;
};

constexpr int kPoolSize = 5, kPoolPadding = 2;
constexpr float kPoolShare = 1.0f / 25.0f;

// Maps the bits of floats to integers of the same order, so that a maximum is exact and cheap in every
// dtype. -inf becomes the smallest integer, and the wrapping subtraction puts NaNs of either sign above
// +inf.
template <class T>
struct PoolOrder;

template <>
struct PoolOrder<float> {
    using Bits = uint32_t;
    using Key = int32_t;
    static constexpr Bits kSignBit = 31, kMagnitude = 0x7fffffffu, kNegativeNans = 0x007fffffu;
};

template <>
struct PoolOrder<Bfloat16> {
    using Bits = uint16_t;
    using Key = int16_t;
    static constexpr Bits kSignBit = 15, kMagnitude = 0x7fff, kNegativeNans = 0x007f;
};

}  // namespace ncsn_fast

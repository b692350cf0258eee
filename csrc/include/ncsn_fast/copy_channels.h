// Copy of some channels of channels-last maps: concatenation along the channels, and its inverse.
//
//   y[pixel, y_first + c] = x[pixel, x_first + c]   for c < channels
#pragma once

#include "ncsn_fast/dtypes.h"

namespace ncsn_fast {

struct CopyChannelsArgs {
    int64_t pixels, channels;
    const void* x;  // first of the channels copied
    void* y;        // where that one goes; the channels on either side of the copy are left alone
    int64_t x_channels, y_channels;  // of a pixel
    Dtype in_dtype, out_dtype;
};

}  // namespace ncsn_fast

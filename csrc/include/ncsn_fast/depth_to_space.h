// A map of larger size from one of more channels, channels-last: of each pixel of z, group r s + t of C
// channels, r, t < s, is pixel (r, t) of a square of y. The first rows and columns are left out:
//
//   y[i, j, c] = z[a, b, (r s + t) C + c],  i + first = s a + r,  j + first = s b + t
#pragma once

#include "ncsn_fast/dtypes.h"

namespace ncsn_fast {

struct DepthToSpaceArgs {
    int64_t batch, height, width, channels;  // of z, but for C
    int64_t out_height, out_width;
    int64_t factor, first;  // s
    const void* z;
    void* y;  // not z
    int64_t y_row;  // elements between two pixels of y, at least `channels`
    Dtype dtype;
};

}  // namespace ncsn_fast

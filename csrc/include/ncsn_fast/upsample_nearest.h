// Enlargement of a channels-last map by whole factors, without interpolation:
//
//   y[i, j] = x[i / rows, j / columns]
#pragma once

#include "ncsn_fast/dtypes.h"

namespace ncsn_fast {

struct UpsampleArgs {
    int64_t batch, height, width, channels;  // of x
    int64_t rows, columns;                   // of y for one of x
    const void* x;
    void* y;  // not x
    int64_t y_row;  // elements between two pixels of y, at least `channels`
    Dtype dtype;
};

}  // namespace ncsn_fast

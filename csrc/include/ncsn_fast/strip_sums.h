// Sums over the pixels of a map that a convolution leaves for the norm that reads it.
//
// An image is cut into strips of whole rows, of about kStripPixels pixels. For each strip and channel there
// are, in float32 and summed in the order of the pixels,
//
//   k = x of the first pixel,   s = sum of x - k,   q = sum of (x - k)^2
//
// so that over the n pixels of a strip the mean is k + s / n, and the sum of squares about it is
// Q = q - s^2 / n. k is one of the values, hence n (k - mean)^2 <= (n - 1) Q and q <= n Q: the subtraction
// makes errors n times as large at most, whatever the mean is. Strips depend on the sizes of the map alone,
// so that no result depends on the threads.
//
// Layout: [image][strip][k, s, q][channel].
#pragma once

#include "ncsn_fast/platform.h"

namespace ncsn_fast {

constexpr int64_t kStripPixels = 64;
constexpr int64_t kStripSums = 3;

struct Strips {
    int64_t rows;   // of a strip; the last one may have fewer
    int64_t count;  // of an image

    NCSN_HD_MEMBER Strips(int64_t height, int64_t width)
        : rows(width < 1 || width > kStripPixels ? 1 : kStripPixels / width), count((height + rows - 1) / rows) {}
};

}  // namespace ncsn_fast

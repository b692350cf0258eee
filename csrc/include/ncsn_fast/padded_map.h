// Channels-last bfloat16 maps with zeros around every image, which a convolution in tiles reads where they
// lie: `border` pixels above and below an image, and between two rows. Neighbours share them: what is right
// of a row is left of the next one, and what is below an image is above the next one. Behind the last image
// there is as much as the last tile of pixels reads beyond it.
//
// Kernels write pixels only: the zeros, and those of channels beyond the last, are written before.
#pragma once

#include "ncsn_fast/platform.h"

namespace ncsn_fast {

// Where the pixels of a channels-last map lie.
struct PixelLayout {
    int64_t height, width;
    int64_t pixel, row, image;  // elements from one to the next
};

NCSN_HD PixelLayout dense_pixels(int64_t height, int64_t width, int64_t channels) {
    return {height, width, channels, width * channels, height * width * channels};
}

constexpr int64_t kTileRun = 16;    // pixels that a product reads
constexpr int64_t kTileChunk = 32;  // and their input channels

struct PaddedMap {
    PixelLayout pixels;
    int64_t first;     // element of the first pixel of the first image
    int64_t elements;  // of the batch

    NCSN_HD_MEMBER PaddedMap(int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t border) {
        const int64_t chunks = (channels + kTileChunk - 1) / kTileChunk;
        const int64_t odd = chunks + (chunks % 2 == 0 ? 1 : 0);  // cache lines of a pixel: avoids set conflicts
        const int64_t pixel = odd * kTileChunk, row = (width + border) * pixel;
        pixels = {height, width, pixel, row, (height + border) * row};
        first = border * (row + pixel);
        elements = batch * pixels.image + border * row + (2 * border + kTileRun) * pixel;
    }
};

}  // namespace ncsn_fast

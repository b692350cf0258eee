// The kernels in tiles as a table of functions: one table per instruction-set level, and one for AMX. All
// but that one emulate the tiles (tile.h), with the same bits.
#pragma once

#include "ncsn_fast/tile_conv.h"

namespace ncsn_fast {

// One TDPBF16PS: sum (16, 16) float32 += a (16, 32) b, b in 16 rows of 16 pairs; rows are `..._stride`
// bytes apart.
struct TileProductArgs {
    float* sum;
    const uint32_t* a;  // pairs of bfloat16s
    const uint32_t* b;
    int64_t sum_stride, a_stride, b_stride;
};

// A tile of output pixels.
struct TilePlace {
    int64_t input;          // element of the padded input at which its first window begins
    int64_t image;
    int64_t row, end;       // of the image; up to the end of the block
    int64_t column;
    int64_t strip, in_strip;  // of the batch; rows of it above this one
};

// Split of a batch into units of work, each a block of strips of output rows and a group of panels.
// Results do not depend on it.
struct TileConvPlan {
    TileConvSizes sizes;
    int64_t reach;    // pixels of padding on each side that are read
    int64_t pixel;    // elements from a pixel of the padded input to the next
    int64_t pitch;    // pixels from a row to the next: the padding between two rows is shared
    int64_t image;    // elements from an image to the next, if x itself is padded
    bool wraps;       // whether tiles go on in the next row
    int64_t along;    // tiles of a row, unless they wrap
    int64_t strip, strips;  // rows of a strip; strips of an image: those of the sums, or rows
    int64_t blocks, groups;
    int64_t tiles_at, sums_at, slot_bytes;  // workspace of one thread

    TileConvPlan(const TileConvArgs& args, int threads);
};

struct TileConvWorkspace {
    unsigned char* data;  // `threads` slots of plan.slot_bytes, 64-byte aligned
    int threads;
};

struct TileKernels {
    void (*product)(const TileProductArgs&);
    void (*convolution)(const TileConvArgs&, const TileConvPlan&, const TileConvWorkspace&);
};

}  // namespace ncsn_fast

// One row of a sampler table on one element:
//
//   x' = a x + b f + g h + c z + e        h' = p x + q f + r
//   then, where an element is known:  x' = known + c_ref z_ref
//
// State and arithmetic are float32; each product-sum is fused in this fixed order on every backend.
#pragma once

#include <cstdint>

#include "ncsn_fast/dtypes.h"

namespace ncsn_fast {

// Streams of the noise contract that an update draws from.
constexpr uint32_t kSamplerStream = 0;
constexpr uint32_t kReferenceStream = 2;
constexpr uint32_t kSecondStream = 3;

constexpr int kRowWidth = 12;  // floats of a row in memory: those of Row in order, and one of padding

struct Row {
    float a, b, g, c, p, q, e, r;
    float c_ref;         // NaN: known elements are not imposed
    float scale, shift;  // scale x' + shift is the network's next input
    uint32_t step, ref_step;
};

// A sampler program in memory, and its next row.
struct Rows {
    const float* table;      // (count, kRowWidth); null: the row is given by value
    const int64_t* steps;    // (count, 2): step, ref_step
    const int32_t* counter;  // at `count` or above an update does nothing
    int64_t count;
};

// Memory layout of the network's input or output, in elements. `channels` per pixel may be read, or are
// written, with zeros for those that the state lacks.
struct MapLayout {
    Dtype dtype;
    int64_t sample, channel, pixel;
    int64_t channels;
};

struct UpdateArgs {
    // Sizes: x and h are (batch, channels, plane) float32, contiguous, updated in place.
    int64_t batch, channels, plane;
    float* x;
    float* h;  // null: no history
    const void* f;
    MapLayout f_layout;
    uint32_t seed;
    const int64_t* seeds;        // (batch,), values below 2^32; null: all have `seed`
    const int64_t* samples;      // (batch,), values below 2^32
    const float* noise_weights;  // (batch, 2) or null
    const uint8_t* mask;         // null: nothing is known
    const float* known;
    Row row;
    Rows rows;
    // Receives the network's next input; null: not written.
    void* net_input;
    MapLayout net_layout;
    int32_t* nonfinite;  // (batch,) or null; set to 1 where a sample's new state is not finite
};

// Loads row `next` of the table, or the row given by value; returns false past the end of the table.
NCSN_HD bool read_row(const UpdateArgs& args, int64_t next, Row& row) {
    row = args.row;
    if (args.rows.table == nullptr) return true;
    if (next < 0 || next >= args.rows.count) return false;
    const float* k = args.rows.table + next * kRowWidth;
    const int64_t* steps = args.rows.steps + 2 * next;
    row = {k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7], k[8], k[9], k[10],
           static_cast<uint32_t>(steps[0]), static_cast<uint32_t>(steps[1])};
    return true;
}

NCSN_HD bool read_row(const UpdateArgs& args, Row& row) {
    return read_row(args, args.rows.table == nullptr ? 0 : *args.rows.counter, row);
}

NCSN_HD uint32_t seed_of(const UpdateArgs& args, int64_t sample) {
    return args.seeds == nullptr ? args.seed : static_cast<uint32_t>(args.seeds[sample]);
}

NCSN_HD float updated_state(const Row& row, float x, float f) {
    return fused(row.b, f, fused(row.a, x, row.e));
}

NCSN_HD float updated_history(const Row& row, float x, float f) {
    return fused(row.q, f, fused(row.p, x, row.r));
}

NCSN_HD float network_input(const Row& row, float x) { return fused(row.scale, x, row.shift); }

// x - x is 0 for finite x and NaN otherwise.
NCSN_HD bool is_nonfinite(float x) { return !(x - x == 0.0f); }

// Whether the state's channels of a map are contiguous in C, H, W order.
NCSN_HD bool in_order(const MapLayout& layout, int64_t channels, int64_t plane) {
    return layout.pixel == 1 && (layout.channel == plane || channels == 1);
}

// Position of element `e` (C, H, W order) in a sample of a map.
NCSN_HD int64_t offset_of(int64_t e, int64_t plane, const MapLayout& layout) {
    return e / plane * layout.channel + e % plane * layout.pixel;
}

}  // namespace ncsn_fast

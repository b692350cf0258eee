// Bilinear resize, added to a map or alone, on the CPU; the equation is in ncsn_fast/resize_add.h. a is
// read and y written once; x is read once for each output row that lies between two of its rows, and
// interpolated along the height once for each of its columns, not of the output's. Bound by memory, or
// by the conversions of bfloat16 in cache.
//
// A unit of work is a tile of a sample: some columns and rows, all channels.
#include "lanes.h"

namespace ncsn_fast::NCSN_ISA {

constexpr int64_t kTileWidth = 32;  // columns whose lines stay in the first-level cache
constexpr int64_t kTileHeight = 8;  // rows for which the sources of the columns are found once

// One row of a tile: the two rows of x it lies between, and the sources of its columns.
template <class T>
struct TileRow {
    const T *low, *high, *a;
    T* y;
    float weight;
    const Source* columns;
    int64_t width, channels;
};

// `count` vectors of n channels, from c, of a row. Columns of x come from left to right and are kept
// while they serve.
template <int count, int n, bool add, class T>
static inline void resize_channels(const TileRow<T>& row, int64_t c) {
    using Value = Lanes<float, n>;
    const auto interpolate = [&](int64_t w, Value* out) {
        const T *low = row.low + w * row.channels + c, *high = row.high + w * row.channels + c;
        NCSN_UNROLL
        for (int k = 0; k < count; ++k) {
            out[k] = between(load_lanes<n>(low + k * n), load_lanes<n>(high + k * n), row.weight);
        }
    };
    Value left[count], right[count];
    int64_t low = row.columns[0].low, high = row.columns[0].high;
    interpolate(low, left), interpolate(high, right);
    for (int64_t w = 0; w < row.width; ++w) {
        const Source source = row.columns[w];
        if (source.low != low) {
            if (source.low == high) {
                NCSN_UNROLL
                for (int k = 0; k < count; ++k) left[k] = right[k];
            } else {
                interpolate(source.low, left);
            }
        }
        if (source.high != high) interpolate(source.high, right);
        low = source.low, high = source.high;
        const int64_t at = w * row.channels + c;
        NCSN_UNROLL
        for (int k = 0; k < count; ++k) {
            Value value = between(left[k], right[k], source.weight);
            if constexpr (add) value = load_lanes<n>(row.a + at + k * n) + value;
            store_lanes<n>(row.y + at + k * n, value);
        }
    }
}

template <bool add, class T>
static inline void resize_row(const TileRow<T>& row) {
    constexpr int kVectors = 4;
    int64_t c = 0;
    for (; c + kVectors * kLanes <= row.channels; c += kVectors * kLanes) {
        resize_channels<kVectors, kLanes, add>(row, c);
    }
    for (; c + kLanes <= row.channels; c += kLanes) resize_channels<1, kLanes, add>(row, c);
    for (; c < row.channels; ++c) resize_channels<1, 1, add>(row, c);
}

// The tile of a sample with corner (top, first).
template <class T, bool add>
static void resize_tile(const ResizeArgs& args, int64_t sample, int64_t top, int64_t first) {
    Source columns[kTileWidth];
    const int64_t width = smaller(kTileWidth, args.out_width - first);
    for (int64_t w = 0; w < width; ++w) {
        columns[w] = source_of(first + w, args.in_width, args.out_width);
    }
    const int64_t line = args.in_width * args.channels;
    const T* x = static_cast<const T*>(args.x) + sample * args.in_height * line;
    for (int64_t r = top; r < smaller(top + kTileHeight, args.out_height); ++r) {
        const Source source = source_of(r, args.in_height, args.out_height);
        const int64_t at = ((sample * args.out_height + r) * args.out_width + first) * args.channels;
        TileRow<T> row{x + source.low * line,
                       x + source.high * line,
                       static_cast<const T*>(args.a),
                       static_cast<T*>(args.y) + at,
                       source.weight,
                       columns,
                       width,
                       args.channels};
        if constexpr (add) row.a += at;
        resize_row<add>(row);
    }
}

template <class T>
static void run(const ResizeArgs& args, int threads) {
    const auto tile = args.a == nullptr ? resize_tile<T, false> : resize_tile<T, true>;
    const int64_t down = pieces(args.out_height, kTileHeight), along = pieces(args.out_width, kTileWidth);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < args.batch * down * along; ++t) {
        tile(args, t / along / down, t / along % down * kTileHeight, t % along * kTileWidth);
    }
}

void resize_add(const ResizeArgs& args, int threads) {
    (args.dtype == Dtype::kFloat32 ? run<float> : run<Bfloat16>)(args, threads);
}

}  // namespace ncsn_fast::NCSN_ISA

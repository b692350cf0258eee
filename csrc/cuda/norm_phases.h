// Instance normalisation++ of channels-last maps on a GPU; the equation is in
// ncsn_fast/instance_norm_plus.h.
//
// Two launches: `Statistics` reduces tiles of pixels to partials (batch, tiles, 2, C), mean and sum of
// squares of each channel, and `Apply` merges the tiles of its sample, standardises the means over the
// channels and writes y. Small samples take one launch, `Single`, a block a sample. Each element is read
// twice and written once, 6 bytes in bfloat16, 4 where the second read is a cache hit. Bound by memory.
#pragma once

#include "norm_statistics.h"

namespace ncsn_fast {

template <class In>
struct Statistics {
    static constexpr int kThreads = kSplitThreads, kPhases = 3;

    struct Shared {
        RowSets<kThreads, In::kWidth> rows;
        GroupSets<kThreads> groups;
    };

    NormArgs args;
    Tiling split;
    float* partials;

    struct Place {
        int64_t sample;
        int tile, column, pixels;
    };

    NCSN_HD_MEMBER Place place(int64_t block) const {
        const auto index = static_cast<uint32_t>(block);
        const uint32_t side = split.lanes.column_blocks, tiles = split.tiles;
        const int tile = static_cast<int>(index / side % tiles);
        const int64_t left = args.plane - static_cast<int64_t>(tile) * split.rows;
        return {index / side / tiles, tile, static_cast<int>(index % side) * split.lanes.columns,
                static_cast<int>(left < split.rows ? left : split.rows)};
    }

    NCSN_HD_MEMBER void run(Phase<0>, int64_t block, int thread, Shared& shared) const {
        const Place at = place(block);
        const int64_t first = at.sample * args.plane + static_cast<int64_t>(at.tile) * split.rows;
        row_statistics<In>(args, split.lanes, first, at.pixels, at.column, thread, shared.rows,
                           shared.groups);
    }

    NCSN_HD_MEMBER void run(Phase<1>, int64_t, int thread, Shared& shared) const {
        group_statistics(split.lanes, thread, shared.rows, shared.groups);
    }

    NCSN_HD_MEMBER void run(Phase<2>, int64_t block, int thread, Shared& shared) const {
        const Place at = place(block);
        const int64_t channel = at.column + thread;
        if (thread >= split.lanes.columns || channel >= args.channels) return;
        const Moments m = column_statistics(split.lanes, thread, at.pixels, shared.groups);
        float* to = partials + (at.sample * split.tiles + at.tile) * (2 * args.channels) + channel;
        to[0] = m.mean, to[args.channels] = m.squares;
    }
};

// What normalises the channels of a block: y = (x - mean) * scale + shift.
template <int n>
struct Columns {
    float mean[n], scale[n], shift[n];
};

NCSN_HD float moved_mean(const NormArgs& args, float mean, int64_t channel) {
    return args.bias == nullptr ? mean : mean + args.bias[channel];
}

// Scale and shift of column `i`, whose `scale` is the variance so far.
template <int n>
NCSN_HD void finish_column(const NormArgs& args, int64_t sample, int64_t channel, const Spread& spread, int i,
                           Columns<n>& columns) {
    const float alpha = args.alpha[sample * args.alpha_row + channel];
    const float gamma = args.gamma[sample * args.gamma_row + channel];
    const float beta = args.beta[sample * args.beta_row + channel];
    const float centred = moved_mean(args, columns.mean[i], channel) - spread.mean;
    columns.scale[i] = gamma * inverse_root(columns.scale[i] + args.eps);
    columns.shift[i] = gamma * alpha * (centred * spread.inverse) + beta;
}

template <class Out>
NCSN_HD float activated(float y, bool elu) {
    if (!elu) return y;
    return Out::kNarrow ? elu_narrow(y) : elu_of(y);
}

// y of a thread's vector in `pixels` pixels from `first` on.
template <class In, class Out, int n>
NCSN_HD void write_rows(const NormArgs& args, const Lanes& lanes, int64_t first, int64_t pixels, int column,
                        int thread, const Columns<n>& columns) {
    constexpr int kWidth = In::kWidth, kBatch = 4;
    const int lane = thread % lanes.lanes, row = thread / lanes.lanes;
    const int64_t channel = column + lane * kWidth;
    if (row >= lanes.rows || channel >= args.channels) return;
    float mean[kWidth], scale[kWidth], shift[kWidth];
    NCSN_UNROLL
    for (int c = 0; c < kWidth; ++c) {
        mean[c] = columns.mean[lane * kWidth + c];
        scale[c] = columns.scale[lane * kWidth + c], shift[c] = columns.shift[lane * kWidth + c];
    }
    const int64_t stride = lanes.rows * args.channels;
    int64_t at = (first + row) * args.channels + channel;
    for (int64_t r = row; r < pixels; r += kBatch * lanes.rows, at += kBatch * stride) {
        typename In::Raw raw[kBatch] = {};  // loaded before any is stored: y may be x
        NCSN_UNROLL
        for (int i = 0; i < kBatch; ++i) {
            if (r + i * lanes.rows < pixels) raw[i] = In::load(args.in_dtype, args.x, at + i * stride);
        }
        NCSN_UNROLL
        for (int i = 0; i < kBatch; ++i) {
            if (r + i * lanes.rows >= pixels) break;
            float y[kWidth];
            NCSN_UNROLL
            for (int c = 0; c < kWidth; ++c) {
                const float v = normalised<false>(In::value(raw[i], c), mean[c], scale[c], shift[c]);
                y[c] = activated<Out>(v, args.elu);
            }
            Out::store(args.out_dtype, args.y, at + i * stride, y);
        }
    }
}

template <class In, class Out>
struct Apply {
    static constexpr int kThreads = kSplitThreads, kPhases = 4, kColumns = kSplitThreads;

    struct Shared {
        SpreadSets<kThreads> spread;
        Columns<kColumns> columns;
    };

    NormArgs args;
    const float* partials;
    int tile_rows, tiles;
    Lanes lanes;
    int64_t rows, row_blocks;  // pixels of a block; blocks one below another

    // Rows enough that reading the partials costs little.
    Apply(const NormArgs& norm, const float* from, const Tiling& split)
        : args(norm), partials(from), tile_rows(split.rows), tiles(split.tiles),
          lanes(norm.channels, In::kWidth, kColumns, kThreads),
          rows(ceil_div(16 * split.tiles, 4 * lanes.rows) * 4 * lanes.rows),
          row_blocks(ceil_div(norm.plane, rows)) {}

    int64_t blocks() const { return args.batch * row_blocks * lanes.column_blocks; }

    struct Place {
        int64_t sample, pixel;
        int column;
    };

    // The samples that were read last come first: they may still be in the cache.
    NCSN_HD_MEMBER Place place(int64_t block) const {
        const auto index = static_cast<uint32_t>(block), below = static_cast<uint32_t>(row_blocks);
        const uint32_t side = lanes.column_blocks;
        return {args.batch - 1 - index / side / below, index / side % below * rows,
                static_cast<int>(index % side) * lanes.columns};
    }

    NCSN_HD_MEMBER Moments merged_tiles(const float* from, bool with_squares) const {
        const int64_t stride = 2 * args.channels;
        const int last = static_cast<int>(args.plane - static_cast<int64_t>(tiles - 1) * tile_rows);
        const auto count = [&](int i) { return static_cast<float>(i + 1 < tiles ? tile_rows : last); };
        const auto mean = [&](int i) { return from[i * stride]; };
        const auto squares = [&](int i) { return with_squares ? from[i * stride + args.channels] : 0.0f; };
        return merged(tiles, static_cast<float>(args.plane), count, mean, squares);
    }

    NCSN_HD_MEMBER void run(Phase<0>, int64_t block, int thread, Shared& shared) const {
        const Place at = place(block);
        const float* from = partials + at.sample * tiles * (2 * args.channels);
        Moments all{0.0f, 0.0f};
        float count = 0.0f;
        for (int64_t c = thread; c < args.channels; c += kThreads, count += 1.0f) {
            const bool own = c >= at.column && c < at.column + lanes.columns;
            const Moments m = merged_tiles(from + c, own);
            all = merged_pair(all, count, {moved_mean(args, m.mean, c), 0.0f}, 1.0f);
            if (!own) continue;
            shared.columns.mean[c - at.column] = m.mean;
            shared.columns.scale[c - at.column] = m.squares / static_cast<float>(args.plane);
        }
        shared.spread.mean[thread] = all.mean, shared.spread.squares[thread] = all.squares;
    }

    NCSN_HD_MEMBER void run(Phase<1>, int64_t, int thread, Shared& shared) const {
        spread_groups(args.channels, thread, shared.spread);
    }

    NCSN_HD_MEMBER void run(Phase<2>, int64_t block, int thread, Shared& shared) const {
        const Place at = place(block);
        const int64_t channel = at.column + thread;
        if (thread >= lanes.columns || channel >= args.channels) return;
        const Spread spread = spread_of(args.channels, args.eps, shared.spread);
        finish_column(args, at.sample, channel, spread, thread, shared.columns);
    }

    NCSN_HD_MEMBER void run(Phase<3>, int64_t block, int thread, Shared& shared) const {
        const Place at = place(block);
        const int64_t left = args.plane - at.pixel;
        write_rows<In, Out>(args, lanes, at.sample * args.plane + at.pixel, left < rows ? left : rows,
                            at.column, thread, shared.columns);
    }
};

template <class In, class Out>
struct Single {
    static constexpr int kThreads = kSingleThreads, kPhases = 6;

    struct Shared {
        union {  // the columns come when the rows have been merged
            RowSets<kThreads, In::kWidth> rows;
            Columns<kSingleChannels> columns;
        };
        GroupSets<kThreads> groups;
        SpreadSets<kThreads> spread;
    };

    NormArgs args;
    Lanes lanes;

    explicit Single(const NormArgs& norm)
        : args(norm), lanes(norm.channels, In::kWidth, kSingleChannels, kThreads) {}

    NCSN_HD_MEMBER void run(Phase<0>, int64_t sample, int thread, Shared& shared) const {
        row_statistics<In>(args, lanes, sample * args.plane, static_cast<int>(args.plane), 0, thread,
                           shared.rows, shared.groups);
    }

    NCSN_HD_MEMBER void run(Phase<1>, int64_t, int thread, Shared& shared) const {
        group_statistics(lanes, thread, shared.rows, shared.groups);
    }

    NCSN_HD_MEMBER void run(Phase<2>, int64_t, int thread, Shared& shared) const {
        if (thread >= args.channels) return;
        const int pixels = static_cast<int>(args.plane);
        const Moments m = column_statistics(lanes, thread, pixels, shared.groups);
        shared.columns.mean[thread] = m.mean;
        shared.columns.scale[thread] = m.squares / static_cast<float>(pixels);
        shared.spread.mean[thread] = moved_mean(args, m.mean, thread), shared.spread.squares[thread] = 0.0f;
    }

    NCSN_HD_MEMBER void run(Phase<3>, int64_t, int thread, Shared& shared) const {
        spread_groups(args.channels, thread, shared.spread);
    }

    NCSN_HD_MEMBER void run(Phase<4>, int64_t sample, int thread, Shared& shared) const {
        if (thread >= args.channels) return;
        const Spread spread = spread_of(args.channels, args.eps, shared.spread);
        finish_column(args, sample, thread, spread, thread, shared.columns);
    }

    NCSN_HD_MEMBER void run(Phase<5>, int64_t sample, int thread, Shared& shared) const {
        write_rows<In, Out>(args, lanes, sample * args.plane, args.plane, 0, thread, shared.columns);
    }
};

}  // namespace ncsn_fast

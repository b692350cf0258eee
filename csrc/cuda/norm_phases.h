// Instance normalisation++ of channels-last maps on a GPU; the equation is in
// ncsn_fast/instance_norm_plus.h.
//
// Two launches: `Statistics` reduces tiles of pixels to partials (batch, tiles, 2, C), mean and sum of
// squares of each channel, and `Apply` merges the tiles of its sample, standardises the means over the
// channels and writes y. Small samples take one launch, `Single`, a block a sample. Each element is read
// twice and written once, 6 bytes in bfloat16, 4 where the second read is a cache hit: so that it is one,
// y leaves the cache first. Bound by memory.
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

// Coefficients that normalise the channels of a block: y = (x - mean) * scale + shift.
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

// Writes y of a thread's pixels; `Normaliser` has what is the same for all of them. `last`: what is
// written is not read again soon.
template <class In, class Out, Activation activation, bool last>
struct Normaliser {
    float mean[In::kWidth], scale[In::kWidth], shift[In::kWidth];

    template <int n>
    NCSN_HD_MEMBER Normaliser(const Columns<n>& columns, int first) {
        NCSN_UNROLL
        for (int c = 0; c < In::kWidth; ++c) {
            mean[c] = columns.mean[first + c];
            scale[c] = columns.scale[first + c], shift[c] = columns.shift[first + c];
        }
    }

    NCSN_HD_MEMBER Normaliser(const float* means, const float* scales, const float* shifts) {
        NCSN_UNROLL
        for (int c = 0; c < In::kWidth; ++c) mean[c] = means[c], scale[c] = scales[c], shift[c] = shifts[c];
    }

    NCSN_HD_MEMBER void write(const NormArgs& args, int64_t at, const typename In::Raw& raw) const {
        float y[In::kWidth];
        NCSN_UNROLL
        for (int c = 0; c < In::kWidth; ++c) {
            y[c] = normalised<Activation::kNone>(In::value(raw, c), mean[c], scale[c], shift[c]);
            y[c] = activated_as<activation, Out::kNarrow>(y[c]);
        }
        Out::template store<last>(args.out_dtype, args.y, at, y);
    }
};

// y of a vector in `left` pixels, `stride` elements apart.
template <class In, class Normaliser>
NCSN_HD void write_pixels(const NormArgs& args, int64_t at, int64_t stride, int64_t left,
                          const Normaliser& normaliser) {
    constexpr int kBatch = 4;
    typename In::Raw raw[kBatch] = {};  // loaded before any is stored: y may be x
    NCSN_NO_UNROLL
    for (; left >= kBatch; left -= kBatch, at += kBatch * stride) {
        load_pixels<In>(args, at, stride, kBatch, raw);
        NCSN_UNROLL
        for (int i = 0; i < kBatch; ++i) normaliser.write(args, at + i * stride, raw[i]);
    }
    load_pixels<In>(args, at, stride, left, raw);
    NCSN_UNROLL
    for (int i = 0; i < kBatch; ++i) {
        if (i < left) normaliser.write(args, at + i * stride, raw[i]);
    }
}

// y of a thread's vector in `pixels` pixels from `first` on.
template <class In, class Out, Activation activation, bool last, int n>
NCSN_HD void write_rows(const NormArgs& args, const Lanes& lanes, int64_t first, int64_t pixels, int column,
                        int thread, const Columns<n>& columns) {
    const int lane = thread % lanes.lanes, row = thread / lanes.lanes;
    const int64_t channel = column + lane * In::kWidth;
    if (row >= lanes.rows || row >= pixels || channel >= args.channels) return;
    const Normaliser<In, Out, activation, last> normaliser(columns, lane * In::kWidth);
    const int64_t stride = lanes.rows * args.channels;
    const int64_t at = (first + row) * args.channels + channel, left = (pixels - 1 - row) / lanes.rows + 1;
    write_pixels<In>(args, at, stride, left, normaliser);
}

// Moments of a channel over all tiles of its sample; without `squares` these are not wanted.
NCSN_HD Moments merged_channel(const NormArgs& args, int tile_rows, int tiles, const float* from,
                               bool with_squares) {
    const float rows = static_cast<float>(tile_rows);
    const float last = static_cast<float>(args.plane - static_cast<int64_t>(tiles - 1) * tile_rows);
    const float* squares = with_squares ? from + args.channels : nullptr;
    return merged_once(tiles, rows, last, 1.0f / static_cast<float>(args.plane), from, squares,
                       2 * args.channels);
}

template <class In, class Out>
struct Apply {
    static constexpr int kThreads = kSplitThreads, kPhases = 4, kColumns = kSplitThreads;
    static constexpr int kResident = sizeof(typename In::Raw) > 16 ? 768 : 1024;

    struct Shared {
        SpreadSets<kThreads> spread;
        Columns<kColumns> columns;
    };

    NormArgs args;
    const float* partials;
    int tile_rows, tiles;
    Lanes lanes;
    int64_t rows, row_blocks;  // pixels of a block; blocks one below another

    // Enough rows that reading the partials costs little.
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

    // Starts with the samples that were read last: they may still be in the cache.
    NCSN_HD_MEMBER Place place(int64_t block) const {
        const auto index = static_cast<uint32_t>(block), below = static_cast<uint32_t>(row_blocks);
        const uint32_t side = lanes.column_blocks;
        return {args.batch - 1 - index / side / below, index / side % below * rows,
                static_cast<int>(index % side) * lanes.columns};
    }

    NCSN_HD_MEMBER void run(Phase<0>, int64_t block, int thread, Shared& shared) const {
        const Place at = place(block);
        const float* from = partials + at.sample * tiles * (2 * args.channels);
        Moments all{0.0f, 0.0f};
        float count = 0.0f;
        for (int64_t c = thread; c < args.channels; c += kThreads, count += 1.0f) {
            const bool own = c >= at.column && c < at.column + lanes.columns;
            const Moments m = merged_channel(args, tile_rows, tiles, from + c, own);
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
        const int64_t first = at.sample * args.plane + at.pixel, left = args.plane - at.pixel;
        const int64_t pixels = left < rows ? left : rows;
        if (args.elu) {
            write_rows<In, Out, Activation::kElu, true>(args, lanes, first, pixels, at.column, thread,
                                                        shared.columns);
        } else {
            write_rows<In, Out, Activation::kNone, true>(args, lanes, first, pixels, at.column, thread,
                                                         shared.columns);
        }
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
        const int64_t first = sample * args.plane;
        if (args.elu) {
            write_rows<In, Out, Activation::kElu, false>(args, lanes, first, args.plane, 0, thread,
                                                         shared.columns);
        } else {
            write_rows<In, Out, Activation::kNone, false>(args, lanes, first, args.plane, 0, thread,
                                                          shared.columns);
        }
    }
};

}  // namespace ncsn_fast

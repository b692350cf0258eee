// Channel statistics of a channels-last map: how blocks tile it, and how threads and blocks merge their
// results. Every split depends on C, H W and the dtypes alone, never on the batch.
#pragma once

#include <algorithm>

#include "access.h"
#include "moments.h"
#include "ncsn_fast/instance_norm_plus.h"
#include "phases.h"

namespace ncsn_fast {

constexpr int kSplitThreads = 256;
constexpr int kSingleThreads = 512;
constexpr int kSingleChannels = kSingleThreads;
constexpr int kLineBytes = 128;  // neighbouring channels that a statistics block reads, in bytes
constexpr int kMostTiles = 32;   // every block that writes y reads the partials of all tiles
constexpr int kSpreadSets = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// The threads of a block: `lanes` vectors of channels side by side in each of `rows` pixels.
struct Lanes {
    int lanes, rows;
    int columns;        // channels of a block, the last of a pixel has fewer
    int column_blocks;  // blocks side by side

    Lanes(int64_t channels, int width, int most_columns, int threads) {
        const int64_t vectors = channels / width, most = most_columns / width;
        column_blocks = static_cast<int>(ceil_div(vectors, most));
        lanes = static_cast<int>(ceil_div(vectors, column_blocks));
        rows = threads / lanes;
        columns = lanes * width;
    }
};

// Pixels per thread; the pixels of a tile are a multiple of it.
NCSN_HD constexpr int chunk_of(int width) { return width > 4 ? 4 : 8; }

// How `Statistics` splits a sample: `tiles` of `rows` pixels.
struct Tiling {
    Lanes lanes;
    int rows, tiles;

    static Tiling of(int64_t channels, int64_t plane, Dtype dtype) {
        const int size = element_size(dtype), wide = 16 / size, width = channels % wide == 0 ? wide : 1;
        const Lanes lanes(channels, width, kLineBytes / size, kSplitThreads);
        const int64_t pass = lanes.rows * chunk_of(width);
        const int64_t rows = ceil_div(ceil_div(plane, pass), kMostTiles) * pass;
        return {lanes, static_cast<int>(std::min(rows, plane)), static_cast<int>(ceil_div(plane, rows))};
    }
};

// The next `n` pixels of a vector, `stride` elements apart, or the `left` there are.
template <class In, int n>
NCSN_HD void load_pixels(const NormArgs& args, int64_t at, int64_t stride, int64_t left,
                         typename In::Raw (&raw)[n]) {
    if (left >= n) {  // without a predicate each
        NCSN_UNROLL
        for (int i = 0; i < n; ++i) raw[i] = In::load(args.in_dtype, args.x, at + i * stride);
    } else {
        NCSN_UNROLL
        for (int i = 0; i < n; ++i) {
            if (i < left) raw[i] = In::load(args.in_dtype, args.x, at + i * stride);
        }
    }
}

// Sums over pixels of a vector, of differences from the first of them: three instructions a value.
template <class In>
struct ShiftedSums {
    float first[In::kWidth], sum[In::kWidth], squares[In::kWidth];

    NCSN_HD_MEMBER explicit ShiftedSums(const typename In::Raw& raw) {
        NCSN_UNROLL
        for (int c = 0; c < In::kWidth; ++c) first[c] = In::value(raw, c), sum[c] = squares[c] = 0.0f;
    }

    NCSN_HD_MEMBER void add(const typename In::Raw& raw) {
        NCSN_UNROLL
        for (int c = 0; c < In::kWidth; ++c) {
            const float d = In::value(raw, c) - first[c];
            sum[c] += d;
            squares[c] = fused(d, d, squares[c]);
        }
    }
};

// Statistics of `count` pixels, `stride` elements apart, of the channels of one vector.
template <class In>
NCSN_HD void vector_statistics(const NormArgs& args, int64_t at, int64_t stride, int count,
                               Moments (&out)[In::kWidth]) {
    constexpr int kAhead = In::kWidth > 1 ? 4 : 8;  // loaded while as many are summed
    if (count == 0) return;
    typename In::Raw raw[kAhead] = {};
    load_pixels<In>(args, at, stride, count, raw);
    ShiftedSums<In> sums(raw[0]);
    int left = count;
    for (; left >= kAhead; left -= kAhead) {
        typename In::Raw next[kAhead] = {};
        at += kAhead * stride;
        load_pixels<In>(args, at, stride, left - kAhead, next);
        NCSN_UNROLL
        for (int i = 0; i < kAhead; ++i) sums.add(raw[i]), raw[i] = next[i];
    }
    NCSN_UNROLL
    for (int i = 0; i < kAhead; ++i) {
        if (i < left) sums.add(raw[i]);
    }
    const float share = 1.0f / static_cast<float>(count);
    NCSN_UNROLL
    for (int c = 0; c < In::kWidth; ++c) {
        out[c] = corrected(sums.first[c], sums.sum[c], sums.squares[c], share);
    }
}

// Channel statistics of a block's threads, merged in two steps.
template <int kThreads, int kWidth>
struct RowSets {
    // Avoids bank conflicts: a warp writes 32 neighbours of a row, and reads all channels of 32 / kWidth
    // of them.
    static constexpr int kPitch = kThreads + (kWidth > 1 ? 32 / kWidth : 0);
    float mean[kWidth * kPitch], squares[kWidth * kPitch];  // [channel of a vector][thread]
};

template <int kThreads>
struct GroupSets {
    float row_count[kThreads];  // pixels of a row of threads
    float mean[kThreads], squares[kThreads], count[kThreads];  // [group of rows][column]
};

// Phase 1 of 3: each thread's own pixels, of `pixels` from `first` on.
template <class In, int kThreads>
NCSN_HD void row_statistics(const NormArgs& args, const Lanes& lanes, int64_t first, int pixels,
                            int column, int thread, RowSets<kThreads, In::kWidth>& rows,
                            GroupSets<kThreads>& groups) {
    const int lane = thread % lanes.lanes, row = thread / lanes.lanes;
    if (row >= lanes.rows) return;
    const int count = row < pixels ? (pixels - 1 - row) / lanes.rows + 1 : 0;
    const int64_t channel = column + lane * In::kWidth;
    Moments own[In::kWidth] = {};
    if (channel < args.channels) {
        const int64_t at = (first + row) * args.channels + channel;
        vector_statistics<In>(args, at, lanes.rows * args.channels, count, own);
    }
    NCSN_UNROLL
    for (int c = 0; c < In::kWidth; ++c) {
        rows.mean[c * rows.kPitch + thread] = own[c].mean;
        rows.squares[c * rows.kPitch + thread] = own[c].squares;
    }
    if (lane == 0) groups.row_count[row] = static_cast<float>(count);
}

NCSN_HD int groups_of(const Lanes& lanes, int threads) {
    const int groups = threads / lanes.columns;
    return groups < lanes.rows ? groups : lanes.rows;
}

// Phase 2: a thread merges a column of a group of rows.
template <int kThreads, int kWidth>
NCSN_HD void group_statistics(const Lanes& lanes, int thread, const RowSets<kThreads, kWidth>& rows,
                              GroupSets<kThreads>& groups) {
    const int number = groups_of(lanes, kThreads);
    const int column = thread % lanes.columns, group = thread / lanes.columns;
    if (group >= number) return;
    const int each = (lanes.rows + number - 1) / number, first = group * each;
    const int left = lanes.rows - first, sets = left < each ? left : each;
    float total = 0.0f;
    for (int i = 0; i < sets; ++i) total += groups.row_count[first + i];
    Moments m{0.0f, 0.0f};
    if (total > 0.0f) {
        const int at = column % kWidth * rows.kPitch + first * lanes.lanes + column / kWidth;
        const float *mean = rows.mean + at, *count = groups.row_count + first, *squares = rows.squares + at;
        m = merged(sets, total, [&](int i) { return count[i]; },
                   [&](int i) { return mean[i * lanes.lanes]; },
                   [&](int i) { return squares[i * lanes.lanes]; });
    }
    groups.mean[thread] = m.mean, groups.squares[thread] = m.squares;
    if (column == 0) groups.count[group] = total;
}

// Phase 3: the groups of a column together.
template <int kThreads>
NCSN_HD Moments column_statistics(const Lanes& lanes, int column, int pixels,
                                  const GroupSets<kThreads>& groups) {
    return merged(groups_of(lanes, kThreads), static_cast<float>(pixels),
                  [&](int i) { return groups.count[i]; },
                  [&](int i) { return groups.mean[i * lanes.columns + column]; },
                  [&](int i) { return groups.squares[i * lanes.columns + column]; });
}

// Means of channels as sets, merged in two steps: thread t has channels t, t + kThreads, ...
template <int kThreads>
struct SpreadSets {
    float mean[kThreads], squares[kThreads];
    float group_mean[kSpreadSets], group_squares[kSpreadSets], group_count[kSpreadSets];
};

template <int kThreads>
NCSN_HD void spread_groups(int64_t channels, int thread, SpreadSets<kThreads>& s) {
    if (thread >= kSpreadSets) return;
    const int sets = channels < kThreads ? static_cast<int>(channels) : kThreads;
    const int each = (sets + kSpreadSets - 1) / kSpreadSets, first = thread * each;
    const int left = sets - first, own = left < each ? left : each;
    const auto count = [&](int i) {
        return static_cast<float>((channels - first - i + kThreads - 1) / kThreads);
    };
    float total = 0.0f;
    for (int i = 0; i < own; ++i) total += count(i);
    Moments m{0.0f, 0.0f};
    if (own > 0) {
        m = merged(own, total, count, [&](int i) { return s.mean[first + i]; },
                   [&](int i) { return s.squares[first + i]; });
    }
    s.group_mean[thread] = m.mean, s.group_squares[thread] = m.squares, s.group_count[thread] = total;
}

NCSN_HD float inverse_root(float x) { return 1.0f / square_root(x); }

struct Spread {
    float mean, inverse;  // of the channels' means: m and 1 / sqrt(v + eps)
};

template <int kThreads>
NCSN_HD Moments spread_moments(int64_t channels, const SpreadSets<kThreads>& s) {
    return merged(kSpreadSets, static_cast<float>(channels), [&](int i) { return s.group_count[i]; },
                  [&](int i) { return s.group_mean[i]; }, [&](int i) { return s.group_squares[i]; });
}

template <int kThreads>
NCSN_HD Spread spread_of(int64_t channels, float eps, const SpreadSets<kThreads>& s) {
    const Moments m = spread_moments(channels, s);
    const float others = static_cast<float>(channels > 1 ? channels - 1 : 1);
    return {m.mean, inverse_root(m.squares / others + eps)};
}

}  // namespace ncsn_fast

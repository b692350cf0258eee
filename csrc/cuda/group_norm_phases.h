// Group normalisation of channels-last maps on a GPU; the equation is in ncsn_fast/group_norm.h.
//
// Three launches: `Statistics` (norm_phases.h) reduces tiles of pixels to partials, `GroupCoefficients`
// merges the tiles and the channels of a group to coefficients (batch, 3, C), mean, scale and shift of
// each channel, and `GroupApply` writes y. Each element is read twice and written once, 6 bytes in
// bfloat16, 4 where the second read is a cache hit: so that it is one, y leaves the cache first. Bound by
// memory.
#pragma once

#include <type_traits>

#include "ncsn_fast/group_norm.h"
#include "norm_phases.h"

namespace ncsn_fast {

constexpr int kGroupThreads = 64;  // of a group: few have more channels

NCSN_HD float value_or(const float* p, int64_t i, float otherwise) { return p == nullptr ? otherwise : p[i]; }

// A block is a group of a sample.
struct GroupCoefficients {
    static constexpr int kThreads = kGroupThreads, kPhases = 3;

    struct Shared {
        SpreadSets<kThreads> spread;
    };

    GroupNormArgs args;
    NormArgs maps;
    const float* partials;
    float* coefficients;
    int tile_rows, tiles;

    struct Place {
        int64_t sample, channel;  // the group's first
    };

    NCSN_HD_MEMBER int64_t size() const { return args.channels / args.groups; }

    NCSN_HD_MEMBER Place place(int64_t block) const {
        return {block / args.groups, block % args.groups * size()};
    }

    // A channel counts as a set of one value with its variance as square.
    NCSN_HD_MEMBER void run(Phase<0>, int64_t block, int thread, Shared& shared) const {
        const Place at = place(block);
        const float* from = partials + at.sample * tiles * (2 * args.channels);
        const float share = 1.0f / static_cast<float>(args.plane);
        Moments all{0.0f, 0.0f};
        float count = 0.0f;
        for (int64_t i = thread; i < size(); i += kThreads, count += 1.0f) {
            const int64_t c = at.channel + i;
            const Moments m = merged_channel(maps, tile_rows, tiles, from + c, true);
            const float moved = m.mean + value_or(args.add, at.sample * args.channels + c, 0.0f);
            all = merged_pair(all, count, {moved, m.squares * share}, 1.0f);
        }
        shared.spread.mean[thread] = all.mean, shared.spread.squares[thread] = all.squares;
    }

    NCSN_HD_MEMBER void run(Phase<1>, int64_t, int thread, Shared& shared) const {
        spread_groups(size(), thread, shared.spread);
    }

    NCSN_HD_MEMBER void run(Phase<2>, int64_t block, int thread, Shared& shared) const {
        const Place at = place(block);
        const Moments m = spread_moments(size(), shared.spread);
        const float rstd = inverse_root(m.squares / static_cast<float>(size()) + args.eps);
        const int64_t row = at.sample * args.channels;
        for (int64_t i = thread; i < size(); i += kThreads) {
            const int64_t c = at.channel + i;
            const float modulation = 1.0f + value_or(args.scale, row + c, 0.0f);
            float* const to = coefficients + 3 * row + c;
            to[0] = m.mean - value_or(args.add, row + c, 0.0f);
            to[args.channels] = value_or(args.gamma, c, 1.0f) * rstd * modulation;
            to[2 * args.channels] =
                fused(value_or(args.beta, c, 0.0f), modulation, value_or(args.shift, row + c, 0.0f));
        }
    }
};

// Activations that have a kernel of their own, and all others, known only at run time.
struct Plain {};
struct Silu {};
struct Other {};

// Calls run(curve).
template <class Run>
void with_curve(Activation activation, Run run) {
    if (activation == Activation::kNone) return run(Plain{});
    if (activation == Activation::kSilu) return run(Silu{});
    run(Other{});
}

template <class In, class Out, class Curve>
struct GroupApply {
    static constexpr int kThreads = kSplitThreads, kPhases = 1, kColumns = kSplitThreads;
    static constexpr int kPixels = 16;  // of a thread: coefficients are read once for all of them
    static constexpr bool kPlain = std::is_same_v<Curve, Plain>, kSilu = std::is_same_v<Curve, Silu>;
    static constexpr int kResident = kPlain || kSilu ? 768 : 512;

    using Shared = NoShared;

    NormArgs args;
    Activation activation;
    const float* coefficients;
    Lanes lanes;
    int64_t rows, row_blocks;  // pixels of a block; blocks one below another

    GroupApply(const NormArgs& maps, Activation chosen, const float* from)
        : args(maps), activation(chosen), coefficients(from),
          lanes(maps.channels, In::kWidth, kColumns, kThreads), rows(kPixels * lanes.rows),
          row_blocks(ceil_div(maps.plane, rows)) {}

    int64_t blocks() const { return args.batch * row_blocks * lanes.column_blocks; }

    template <Activation a>
    using Normalise = Normaliser<In, Out, a, true>;

    // Starts with the samples that were read last: they may still be in the cache.
    NCSN_HD_MEMBER void run(Phase<0>, int64_t block, int thread, Shared&) const {
        const auto index = static_cast<uint32_t>(block), below = static_cast<uint32_t>(row_blocks);
        const uint32_t side = lanes.column_blocks;
        const int64_t sample = args.batch - 1 - index / side / below;
        const int64_t channel = static_cast<int>(index % side) * lanes.columns + thread % lanes.lanes * In::kWidth;
        const int row = thread / lanes.lanes;
        const int64_t pixel = index / side % below * rows + row;
        if (row >= lanes.rows || pixel >= args.plane || channel >= args.channels) return;
        const int64_t rest = (args.plane - 1 - pixel) / lanes.rows + 1, left = rest < kPixels ? rest : kPixels;
        const int64_t at = (sample * args.plane + pixel) * args.channels + channel;
        const int64_t stride = lanes.rows * args.channels;
        const float* const mean = coefficients + sample * (3 * args.channels) + channel;
        const float *const scale = mean + args.channels, *const shift = scale + args.channels;
        if constexpr (kPlain || kSilu) {
            constexpr Activation kOwn = kSilu ? Activation::kSilu : Activation::kNone;
            write_pixels<In>(args, at, stride, left, Normalise<kOwn>(mean, scale, shift));
        } else {
            with_activation(activation, [&]<Activation a>(Activating<a>) {
                const Normalise<a> normaliser(mean, scale, shift);
                NCSN_NO_UNROLL
                for (int64_t i = 0; i < left; ++i) {
                    const int64_t to = at + i * stride;
                    normaliser.write(args, to, In::load(args.in_dtype, args.x, to));
                }
            });
        }
    }
};

}  // namespace ncsn_fast

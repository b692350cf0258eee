// Instance normalisation++ on the CPU; the equation is in ncsn_fast/instance_norm_plus.h.
//
// Per sample: statistics of each tile (read once from memory, twice from cache), merged in a fixed
// order; then one pass that normalises. Two reads and one write an element; where a sample fits the
// second-level cache the second read stays there. Bound by memory, or by ELU where data is in cache.
//
// A tile's statistics are two-pass: first a rough mean about the tile's first element, then sums of
// d = x - rough and of d^2. The mean is kept as rough + mean(d), so it is good to more than float32,
// and a constant channel gives exactly zero variance.
//
// Workspace of a sample: mean and sum of squares of each channel in double; mean, scale and shift of
// each channel; then per tile the rough mean, mean of d and sum of squares of each channel.
#include <omp.h>

#include "level.h"

namespace ncsn_fast::NCSN_ISA {

constexpr int kSumLanes = 32;  // lanes of a contiguous sum, at every instruction-set level

struct TileStats {
    float* rough;
    float* rest;
    float* squares;
};

struct Affine {
    float* mean;
    float* scale;
    float* shift;
};

static inline double* merged_of(float* slot) { return reinterpret_cast<double*>(slot); }

static inline Affine affine_of(float* slot, int64_t channels) {
    float* base = slot + 4 * channels;
    return {base, base + channels, base + 2 * channels};
}

static inline TileStats tile_stats(float* slot, int64_t tile, int64_t channels) {
    float* base = slot + (7 + 3 * tile) * channels;
    return {base, base + channels, base + 2 * channels};
}

static inline int64_t tile_length(const NormArgs& args, const NormPlan& plan, int64_t tile) {
    return smaller(plan.tile_size, args.plane - tile * plan.tile_size);
}

// Statistics of K vectors of neighbouring channels over `rows` positions, channels last.
template <int K, class V, class In>
static inline void column_stats(const In* x, int64_t rows, int64_t stride, TileStats out) {
    constexpr int64_t kWidth = sizeof(V) / sizeof(float);
    V origin[K], sum[K] = {}, rest[K] = {}, squares[K] = {};
    for (int k = 0; k < K; ++k) origin[k] = load<V>(x + k * kWidth);
    for (int64_t r = 1; r < rows; ++r) {
        for (int k = 0; k < K; ++k) sum[k] += load<V>(x + r * stride + k * kWidth) - origin[k];
    }
    const float inverse = 1.0f / static_cast<float>(rows);
    for (int k = 0; k < K; ++k) origin[k] += sum[k] * inverse;
    for (int64_t r = 0; r < rows; ++r) {
        for (int k = 0; k < K; ++k) {
            const V d = load<V>(x + r * stride + k * kWidth) - origin[k];
            rest[k] += d;
            squares[k] += d * d;
        }
    }
    for (int k = 0; k < K; ++k) {
        const V mean_rest = rest[k] * inverse;
        store_vector(out.rough + k * kWidth, origin[k]);
        store_vector(out.rest + k * kWidth, mean_rest);
        store_vector(out.squares + k * kWidth, squares[k] - rest[k] * mean_rest);
    }
}

template <class In>
static void tile_stats_channels_last(const In* x, int64_t rows, int64_t channels, TileStats out) {
    constexpr int kVectors = 4;
    int64_t c = 0;
    const auto at = [&] { return TileStats{out.rough + c, out.rest + c, out.squares + c}; };
    for (; c + kVectors * kLanes <= channels; c += kVectors * kLanes) {
        column_stats<kVectors, Vec>(x + c, rows, channels, at());
    }
    for (; c + kLanes <= channels; c += kLanes) column_stats<1, Vec>(x + c, rows, channels, at());
    for (; c < channels; ++c) column_stats<1, float>(x + c, rows, channels, at());
}

// A contiguous sum in kSumLanes lanes.
struct Lanes {
    static constexpr int kVectors = kSumLanes / kLanes;
    Vec v[kVectors] = {};

    // The lanes added up in a fixed tree.
    float total() const {
        float lane[kSumLanes];
        memcpy(lane, v, sizeof lane);
        for (int half = kSumLanes / 2; half > 0; half /= 2) {
            for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
        }
        return lane[0];
    }
};

// Sums of d = x - origin and of d^2 over `count` contiguous elements.
template <class In>
static inline void centred_sums(const In* x, int64_t count, float origin, Lanes& sum, Lanes& squares) {
    const auto add = [&](const auto* p) {
        for (int k = 0; k < Lanes::kVectors; ++k) {
            const Vec d = load<Vec>(p + k * kLanes) - origin;
            sum.v[k] += d;
            squares.v[k] += d * d;
        }
    };
    int64_t i = 0;
    for (; i + kSumLanes <= count; i += kSumLanes) add(x + i);
    if (i == count) return;
    float tail[kSumLanes];  // filled up with elements that add nothing
    for (int k = 0; k < kSumLanes; ++k) tail[k] = i + k < count ? to_float(x[i + k]) : origin;
    add(static_cast<const float*>(tail));
}

template <class In>
static void tile_stats_contiguous(const In* x, int64_t count, TileStats out) {
    const float inverse = 1.0f / static_cast<float>(count);
    Lanes sum, unused, rest, squares;
    const float first = to_float(x[0]);
    centred_sums(x, count, first, sum, unused);
    const float rough = first + sum.total() * inverse;
    centred_sums(x, count, rough, rest, squares);
    const float rest_sum = rest.total();
    *out.rough = rough;
    *out.rest = rest_sum * inverse;
    *out.squares = squares.total() - rest_sum * (rest_sum * inverse);
}

// Merges the tiles (Chan et al. 1979) in order: double mean and sum of squares of each channel.
static void merge_tiles(const NormArgs& args, const NormPlan& plan, float* slot, double* mean,
                        double* squares) {
    double count = 0.0;
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
        const TileStats s = tile_stats(slot, tile, args.channels);
        const double length = static_cast<double>(tile_length(args, plan, tile));
        const double share = length / (count + length);
        const double weight = count * share;
#pragma omp simd
        for (int64_t c = 0; c < args.channels; ++c) {
            const double old_mean = tile == 0 ? 0.0 : mean[c];
            const double old_squares = tile == 0 ? 0.0 : squares[c];
            const double delta = (static_cast<double>(s.rough[c]) + s.rest[c]) - old_mean;
            const double own = s.squares[c] < 0.0f ? 0.0f : s.squares[c];
            mean[c] = old_mean + delta * share;
            squares[c] = old_squares + own + delta * delta * weight;
        }
        count += length;
    }
}

// From the tiles of sample n: the mean, scale and shift that normalise each channel.
static void finalise(const NormArgs& args, const NormPlan& plan, int64_t n, float* slot) {
    const int64_t channels = args.channels;
    const Affine out = affine_of(slot, channels);
    double *mean = merged_of(slot), *squares = mean + channels;
    merge_tiles(args, plan, slot, mean, squares);
    double centre = 0.0, spread = 0.0;
    for (int64_t c = 0; c < channels; ++c) centre += mean[c];
    centre /= static_cast<double>(channels);
    for (int64_t c = 0; c < channels; ++c) spread += (mean[c] - centre) * (mean[c] - centre);
    spread /= static_cast<double>(channels > 1 ? channels - 1 : 1);
    const double rstd_channels = 1.0 / __builtin_sqrt(spread + args.eps);
    const double plane = static_cast<double>(args.plane);
    const int64_t row = args.per_sample ? n * channels : 0;
    const float *alpha = args.alpha + row, *gamma = args.gamma + row, *beta = args.beta + row;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
        const double scale = gamma[c] / __builtin_sqrt(squares[c] / plane + args.eps);
        const double mean_hat = (mean[c] - centre) * rstd_channels;
        const float rounded = static_cast<float>(mean[c]);
        const double shift = static_cast<double>(gamma[c]) * alpha[c] * mean_hat + beta[c];
        out.mean[c] = rounded;
        out.scale[c] = static_cast<float>(scale);
        out.shift[c] = static_cast<float>(shift - (mean[c] - rounded) * scale);
    }
}

template <bool elu, class In, class Out>
static void apply_channels_last(const In* x, Out* y, int64_t rows, int64_t channels, Affine a) {
    for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
            const float v = to_float(x[r * channels + c]);
            store(y + r * channels + c, normalised<elu>(v, a.mean[c], a.scale[c], a.shift[c]));
        }
    }
}

template <bool elu, class In, class Out>
static void apply_contiguous(const In* x, Out* y, int64_t count, float mean, float scale, float shift) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        store(y + i, normalised<elu>(to_float(x[i]), mean, scale, shift));
    }
}

// The work on one unit of one sample for given types.
template <class In, class Out>
struct Pass {
    const NormArgs& args;
    const NormPlan& plan;

    int64_t start(int64_t n, int64_t unit) const {
        const int64_t sample = n * args.channels * args.plane;
        if (args.channels_last) return sample + unit * plan.tile_size * args.channels;
        return sample + unit / plan.tiles * args.plane + unit % plan.tiles * plan.tile_size;
    }

    void stats(int64_t n, int64_t unit, float* slot) const {
        const In* x = static_cast<const In*>(args.x) + start(n, unit);
        const int64_t tile = args.channels_last ? unit : unit % plan.tiles;
        const TileStats out = tile_stats(slot, tile, args.channels);
        const int64_t length = tile_length(args, plan, tile);
        if (args.channels_last) {
            tile_stats_channels_last(x, length, args.channels, out);
        } else {
            const int64_t c = unit / plan.tiles;
            tile_stats_contiguous(x, length, {out.rough + c, out.rest + c, out.squares + c});
        }
    }

    template <bool elu>
    void apply_as(int64_t n, int64_t unit, float* slot) const {
        const In* x = static_cast<const In*>(args.x) + start(n, unit);
        Out* y = static_cast<Out*>(args.y) + start(n, unit);
        const Affine a = affine_of(slot, args.channels);
        if (args.channels_last) {
            apply_channels_last<elu>(x, y, tile_length(args, plan, unit), args.channels, a);
        } else {
            const int64_t c = unit / plan.tiles, length = tile_length(args, plan, unit % plan.tiles);
            apply_contiguous<elu>(x, y, length, a.mean[c], a.scale[c], a.shift[c]);
        }
    }

    void apply(int64_t n, int64_t unit, float* slot) const {
        args.elu ? apply_as<true>(n, unit, slot) : apply_as<false>(n, unit, slot);
    }
};

// Whole rounds of samples go one to a thread, which keeps a sample in its own cache; what is left
// (fewer samples than threads) is shared unit by unit.
template <class In, class Out>
static void run(const NormArgs& args, const NormPlan& plan, const NormWorkspace& workspace) {
    const Pass<In, Out> pass{args, plan};
    const int64_t left = args.batch % workspace.threads, whole = args.batch - left;
    const auto slot = [&](int64_t i) { return workspace.data + i * plan.slot_floats; };
#pragma omp parallel num_threads(workspace.threads)
    {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < whole; ++n) {
            float* own = slot(omp_get_thread_num());
            for (int64_t u = 0; u < plan.units; ++u) pass.stats(n, u, own);
            finalise(args, plan, n, own);
            for (int64_t u = 0; u < plan.units; ++u) pass.apply(n, u, own);
        }
        if (left > 0) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < left * plan.units; ++t) {
                pass.stats(whole + t / plan.units, t % plan.units, slot(t / plan.units));
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < left; ++i) finalise(args, plan, whole + i, slot(i));
#pragma omp for schedule(static)
            for (int64_t t = 0; t < left * plan.units; ++t) {
                pass.apply(whole + t / plan.units, t % plan.units, slot(t / plan.units));
            }
        }
    }
}

void instance_norm_plus(const NormArgs& args, const NormPlan& plan, const NormWorkspace& workspace) {
    const bool wide_in = args.in_dtype == Dtype::kFloat32, wide_out = args.out_dtype == Dtype::kFloat32;
    const auto chosen = wide_in ? (wide_out ? run<float, float> : run<float, Bfloat16>)
                                : (wide_out ? run<Bfloat16, float> : run<Bfloat16, Bfloat16>);
    chosen(args, plan, workspace);
}

}  // namespace ncsn_fast::NCSN_ISA

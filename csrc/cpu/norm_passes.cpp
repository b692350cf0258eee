#include "norm_passes.h"

#include <omp.h>

namespace ncsn_fast::NCSN_ISA {

struct TileStats {
    double* mean;
    float* squares;
};

static inline ChannelStats merged_of(float* slot, int64_t channels) {
    auto* const mean = reinterpret_cast<double*>(slot);
    return {mean, mean + channels};
}

static inline TileStats tile_stats(const NormPlan& plan, float* slot, int64_t tile, int64_t channels) {
    double* means = merged_of(slot, channels).squares + channels;
    float* squares = slot + (4 + 2 * plan.tiles) * channels;
    return {means + tile * channels, squares + tile * channels};
}

static inline Affine affine_of(const NormPlan& plan, float* slot, int64_t channels) {
    float* base = slot + (4 + 3 * plan.tiles) * channels;
    return {base, base + channels, base + 2 * channels};
}

static inline int64_t tile_length(const NormMaps& maps, const NormPlan& plan, int64_t tile) {
    return smaller(plan.tile_size, maps.plane - tile * plan.tile_size);
}

// Number of rows summed in float32 before widening to double; sums of bfloat16s lose nothing relevant.
template <class In>
constexpr int kNarrowRows = sizeof(In) == sizeof(float) ? 1 : 8;

template <int n>
static inline void add_widened(Lanes<double, n>& sum, Lanes<float, n> v) {
    sum += __builtin_convertvector(v, Lanes<double, n>);
}

// Statistics of k vectors of n neighbouring channels over `rows` positions, channels last.
template <int k, int n, class In>
static inline void column_stats(const In* x, int64_t rows, int64_t stride, TileStats out) {
    constexpr int kPart = n == kLanes ? n / 2 : n, kParts = k * n / kPart;  // of a register of doubles
    Lanes<double, kPart> mean[kParts] = {};
    Lanes<float, n> rounded[k], squares[k] = {};
    for (int64_t first = 0; first < rows; first += kNarrowRows<In>) {
        Lanes<float, n> sum[k] = {};
        const int64_t last = smaller(first + kNarrowRows<In>, rows);
        for (int64_t r = first; r < last; ++r) {
            NCSN_UNROLL
            for (int i = 0; i < k; ++i) sum[i] += load_lanes<n>(x + r * stride + i * n);
        }
        Lanes<float, kPart> parts[kParts];
        memcpy(parts, sum, sizeof sum);
        NCSN_UNROLL
        for (int i = 0; i < kParts; ++i) add_widened<kPart>(mean[i], parts[i]);
    }
    Lanes<float, kPart> narrowed[kParts];
    NCSN_UNROLL
    for (int i = 0; i < kParts; ++i) {
        mean[i] /= static_cast<double>(rows);
        narrowed[i] = __builtin_convertvector(mean[i], Lanes<float, kPart>);
        store_vector(out.mean + i * kPart, mean[i]);
    }
    memcpy(rounded, narrowed, sizeof rounded);
    for (int64_t r = 0; r < rows; ++r) {
        NCSN_UNROLL
        for (int i = 0; i < k; ++i) {
            const Lanes<float, n> d = load_lanes<n>(x + r * stride + i * n) - rounded[i];
            squares[i] += d * d;
        }
    }
    NCSN_UNROLL
    for (int i = 0; i < k; ++i) store_vector(out.squares + i * n, squares[i]);
}

template <class In>
static void tile_stats_channels_last(const In* x, int64_t rows, int64_t channels, TileStats out) {
    for_each_block(channels, [=]<int n, int k>(int64_t c, Width<n>, Width<k>) {
        column_stats<k, n>(x + c, rows, channels, {out.mean + c, out.squares + c});
    });
}

// Calls add(elements) for each run of kSumLanes of `count` elements, the last one filled up with `fill`.
template <class In, class Add>
static inline void for_each_run(const In* x, int64_t count, float fill, Add add) {
    int64_t i = 0;
    for (; i + kSumLanes <= count; i += kSumLanes) add(x + i);
    if (i == count) return;
    float tail[kSumLanes];
    for (int k = 0; k < kSumLanes; ++k) tail[k] = i + k < count ? to_float(x[i + k]) : fill;
    add(static_cast<const float*>(tail));
}

template <class In>
static inline double contiguous_mean(const In* x, int64_t count) {
    constexpr int kHalf = kLanes / 2, kVectors = kSumLanes / kHalf;
    VecDouble sum[kVectors] = {};
    for_each_run(x, count, 0.0f, [&](const auto* p) {
        for (int k = 0; k < kVectors; ++k) sum[k] += widen(load<VecHalf>(p + k * kHalf));
    });
    double lanes[kSumLanes];
    memcpy(lanes, sum, sizeof lanes);
    return total(lanes) / static_cast<double>(count);
}

template <class In>
static inline float contiguous_squares(const In* x, int64_t count, float mean) {
    constexpr int kVectors = kSumLanes / kLanes;
    Vec sum[kVectors] = {};
    for_each_run(x, count, mean, [&](const auto* p) {
        for (int k = 0; k < kVectors; ++k) {
            const Vec d = load<Vec>(p + k * kLanes) - mean;
            sum[k] += d * d;
        }
    });
    float lanes[kSumLanes];
    memcpy(lanes, sum, sizeof lanes);
    return total(lanes);
}

// A channel's mean over a part of the plane, and its sum of squares about that mean.
struct PartStats {
    double mean, squares;
};

// Merges parts of `size` positions (Chan et al. 1979) in order: double mean and sum of squares of each
// channel. part(i, length) is a function that returns a channel's statistics over part i.
template <class Part>
static inline void merge(const NormMaps& maps, int64_t size, ChannelStats out, Part part) {
    double* const mean = out.mean;
    double* const squares = out.squares;
    double count = 0.0;
    for (int64_t i = 0; i * size < maps.plane; ++i) {
        const double length = static_cast<double>(smaller(size, maps.plane - i * size));
        const double share = length / (count + length);
        const double weight = count * share;
        const auto stats = part(i, length);
#pragma omp simd
        for (int64_t c = 0; c < maps.channels; ++c) {
            const PartStats own = stats(c);
            const double old_mean = i == 0 ? 0.0 : mean[c];
            const double old_squares = i == 0 ? 0.0 : squares[c];
            const double delta = own.mean - old_mean;
            mean[c] = old_mean + delta * share;
            squares[c] = old_squares + (own.squares < 0.0 ? 0.0 : own.squares) + delta * delta * weight;
        }
        count += length;
    }
}

static void merge_tiles(const NormMaps& maps, const NormPlan& plan, float* slot, ChannelStats out) {
    merge(maps, plan.tile_size, out, [&](int64_t tile, double length) {
        const TileStats s = tile_stats(plan, slot, tile, maps.channels);
        return [s, length](int64_t c) {
            // Corrects the sum of squares from the rounded mean to the mean.
            const double rest = s.mean[c] - static_cast<double>(static_cast<float>(s.mean[c]));
            return PartStats{s.mean[c], static_cast<double>(s.squares[c]) - length * rest * rest};
        };
    });
}

static void merge_strips(const NormMaps& maps, int64_t n, ChannelStats out) {
    const int64_t strip = maps.context.strip, channels = maps.channels;
    const float* const sums = maps.context.strip_sums + n * pieces(maps.plane, strip) * kStripSums * channels;
    merge(maps, strip, out, [=](int64_t i, double length) {
        const float* const shift = sums + i * kStripSums * channels;
        return [shift, channels, length](int64_t c) {
            const double sum = shift[channels + c], squares = shift[2 * channels + c];
            return PartStats{shift[c] + sum / length, squares - sum * sum / length};
        };
    });
}

// Neighbouring pixels of y lie `y_pixel` elements apart.
template <Activation activation, class In, class Out>
static void apply_channels_last(const In* x, Out* y, int64_t rows, int64_t channels, int64_t y_pixel,
                                Affine a) {
    for_each_vector(channels, [=]<int n>(int64_t c, Width<n>) {
        float mean[n], scale[n], shift[n], lane[n];
        memcpy(mean, a.mean + c, sizeof mean);
        memcpy(scale, a.scale + c, sizeof scale);
        memcpy(shift, a.shift + c, sizeof shift);
        for (int64_t r = 0; r < rows; ++r) {
            const auto v = load_lanes<n>(x + r * channels + c);
            memcpy(lane, &v, sizeof lane);
#pragma omp simd
            for (int i = 0; i < n; ++i) lane[i] = normalised<activation>(lane[i], mean[i], scale[i], shift[i]);
            store_lanes<n>(y + r * y_pixel + c, load_bits<Lanes<float, n>>(lane));
        }
    });
}

template <Activation activation, class In, class Out>
static void apply_contiguous(const In* x, Out* y, int64_t count, float mean, float scale, float shift) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        store(y + i, normalised<activation>(to_float(x[i]), mean, scale, shift));
    }
}

// Processes one unit of one sample for given dtypes.
template <class In, class Out>
struct Pass {
    const NormMaps& maps;
    const NormPlan& plan;

    int64_t start(int64_t n, int64_t unit) const {
        const int64_t sample = n * maps.channels * maps.plane;
        if (maps.channels_last) return sample + unit * plan.tile_size * maps.channels;
        return sample + unit / plan.tiles * maps.plane + unit % plan.tiles * plan.tile_size;
    }

    void stats(int64_t n, int64_t unit, float* slot) const {
        const In* x = static_cast<const In*>(maps.x) + start(n, unit);
        const int64_t tile = maps.channels_last ? unit : unit % plan.tiles;
        const TileStats out = tile_stats(plan, slot, tile, maps.channels);
        const int64_t length = tile_length(maps, plan, tile);
        if (maps.channels_last) {
            tile_stats_channels_last(x, length, maps.channels, out);
        } else {
            const int64_t c = unit / plan.tiles;
            out.mean[c] = contiguous_mean(x, length);
            out.squares[c] = contiguous_squares(x, length, static_cast<float>(out.mean[c]));
        }
    }

    // The pixels of a tile, row by row of y unless that is dense.
    template <Activation activation>
    void apply_rows(int64_t n, int64_t tile, Affine a) const {
        const In* x = static_cast<const In*>(maps.x) + start(n, tile);
        const PixelLayout& to = maps.context.y_pixels;
        Out* const y = static_cast<Out*>(maps.y) + n * to.image;
        const bool dense = to.row == to.width * to.pixel;
        int64_t at = tile * plan.tile_size;
        const int64_t end = at + tile_length(maps, plan, tile);
        while (at < end) {
            const int64_t row = at / to.width, column = at % to.width;
            const int64_t count = dense ? end - at : smaller(to.width - column, end - at);
            Out* const out = y + row * to.row + column * to.pixel;
            apply_channels_last<activation>(x, out, count, maps.channels, to.pixel, a);
            x += count * maps.channels, at += count;
        }
    }

    template <Activation activation>
    void apply_as(int64_t n, int64_t unit, float* slot) const {
        const Affine a = affine_of(plan, slot, maps.channels);
        if (maps.channels_last) return apply_rows<activation>(n, unit, a);
        const In* x = static_cast<const In*>(maps.x) + start(n, unit);
        Out* y = static_cast<Out*>(maps.y) + start(n, unit);
        const int64_t c = unit / plan.tiles, length = tile_length(maps, plan, unit % plan.tiles);
        apply_contiguous<activation>(x, y, length, a.mean[c], a.scale[c], a.shift[c]);
    }

    void apply(int64_t n, int64_t unit, float* slot) const {
        with_activation(maps.activation, [&]<Activation a>(Activating<a>) { apply_as<a>(n, unit, slot); });
    }
};

// The steps of one norm: how many units of statistics and of the last pass there are, 0 without them, and
// what is between.
struct Steps {
    int64_t stats_units, apply_units;
    Finalise finalise;
    const void* args;
};

static void finalise_sample(const NormMaps& maps, const NormPlan& plan, const Steps& steps, int64_t n,
                            float* slot) {
    const ChannelStats stats = merged_of(slot, maps.channels);
    if (maps.context.strip_sums != nullptr) merge_strips(maps, n, stats);
    if (steps.stats_units > 0) merge_tiles(maps, plan, slot, stats);
    steps.finalise(steps.args, n, stats, affine_of(plan, slot, maps.channels));
}

// As long as there are enough samples, each thread takes a whole one, which stays in its cache; the
// remaining samples (fewer than threads) are split into units.
template <class In, class Out>
static void run(const NormMaps& maps, const NormPlan& plan, const NormWorkspace& workspace,
                const Steps& steps) {
    const Pass<In, Out> pass{maps, plan};
    const int64_t left = maps.batch % workspace.threads, whole = maps.batch - left;
    const int64_t stats_units = steps.stats_units, apply_units = steps.apply_units;
    const auto slot = [&](int64_t i) { return workspace.data + i * plan.slot_floats; };
#pragma omp parallel num_threads(workspace.threads)
    {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < whole; ++n) {
            float* own = slot(omp_get_thread_num());
            for (int64_t u = 0; u < stats_units; ++u) pass.stats(n, u, own);
            finalise_sample(maps, plan, steps, n, own);
            for (int64_t u = 0; u < apply_units; ++u) pass.apply(n, u, own);
        }
        if (left > 0) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < left * stats_units; ++t) {
                pass.stats(whole + t / stats_units, t % stats_units, slot(t / stats_units));
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < left; ++i) finalise_sample(maps, plan, steps, whole + i, slot(i));
#pragma omp for schedule(static)
            for (int64_t t = 0; t < left * apply_units; ++t) {
                pass.apply(whole + t / apply_units, t % apply_units, slot(t / apply_units));
            }
        }
    }
}

void run_norm(const NormMaps& maps, const NormPlan& plan, const NormWorkspace& workspace, Passes passes,
              Finalise finalise, const void* args) {
    const bool wide_in = maps.in_dtype == Dtype::kFloat32, wide_out = maps.out_dtype == Dtype::kFloat32;
    const auto chosen = wide_in ? (wide_out ? run<float, float> : run<float, Bfloat16>)
                                : (wide_out ? run<Bfloat16, float> : run<Bfloat16, Bfloat16>);
    const bool reads = passes != Passes::kApply && maps.context.strip_sums == nullptr;
    const bool applies = passes != Passes::kStatistics;
    chosen(maps, plan, workspace, {reads ? plan.units : 0, applies ? plan.units : 0, finalise, args});
}

}  // namespace ncsn_fast::NCSN_ISA

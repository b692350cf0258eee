// Gradients of norms and activations on the CPU; the equations are in ncsn_fast/norm_gradients.h. The sums
// read x and grad once, the gradient reads them once more and writes once. Bound by memory, or by the
// activation's derivative where data is in cache.
#include "ncsn_fast/norm_gradients.h"

#include "norm_passes.h"

namespace ncsn_fast::NCSN_ISA {

constexpr int64_t kNarrow = 64;      // elements of a lane that are summed in float32 before widening to double
constexpr int64_t kColumns = 64;     // channels of a unit of the sums, channels last
constexpr int64_t kElements = 4096;  // of a unit of the gradient

static void copy_moments(const void* norm, int64_t n, ChannelStats stats, Affine) {
    const MomentsArgs& args = *static_cast<const MomentsArgs*>(norm);
    double* const mean = args.moments + 2 * n * args.channels;
    for (int64_t c = 0; c < args.channels; ++c) {
        mean[c] = stats.mean[c];
        mean[args.channels + c] = stats.squares[c] / static_cast<double>(args.plane);
    }
}

void moments(const MomentsArgs& args, const NormPlan& plan, const NormWorkspace& workspace) {
    const NormContext context{nullptr, 0, dense_pixels(1, args.plane, args.channels)};
    const NormMaps maps{args.batch,         args.channels, args.plane, args.x,            nullptr,
                        args.channels_last, args.dtype,    args.dtype, Activation::kNone, context};
    run_norm(maps, plan, workspace, Passes::kStatistics, copy_moments, &args);
}

// The five parameters of n neighbouring channels.
template <int n>
struct Parameters {
    float mean[n], scale[n], shift[n], slope[n], offset[n];

    Parameters(const NormGradientArgs& args, int64_t sample, int64_t c) {
        float* const to[] = {mean, scale, shift, slope, offset};
        for (int row = 0; row < 5; ++row) {
            if (args.rows == nullptr) {
                for (int i = 0; i < n; ++i) to[row][i] = row == 1 ? 1.0f : 0.0f;
            } else {
                memcpy(to[row], args.rows + (5 * sample + row) * args.channels + c, sizeof mean);
            }
        }
    }
};

template <int n, class T>
static inline void load_into(float (&lane)[n], const T* p) {
    const auto v = load_lanes<n>(p);
    memcpy(lane, &v, sizeof v);
}

// The derivative of the activation at a centred x, times the gradient.
template <Activation activation>
static inline __attribute__((always_inline)) float passed(float grad, float centred, float scale, float shift) {
    return grad * derivative<activation>(fused(centred, scale, shift));
}

// Both sums of n neighbouring channels over `rows` positions, channels last.
template <Activation activation, int n, class T>
static inline void column_sums(const T* x, const T* grad, int64_t rows, int64_t stride, const Parameters<n>& p,
                               double* total, double* along) {
    double sum[n] = {}, dot[n] = {};
    for (int64_t first = 0; first < rows; first += kNarrow) {
        float narrow_sum[n] = {}, narrow_dot[n] = {}, v[n], g[n];
        const int64_t last = smaller(first + kNarrow, rows);
        for (int64_t r = first; r < last; ++r) {
            load_into<n>(v, x + r * stride);
            load_into<n>(g, grad + r * stride);
#pragma omp simd
            for (int i = 0; i < n; ++i) {
                const float centred = v[i] - p.mean[i];
                const float part = passed<activation>(g[i], centred, p.scale[i], p.shift[i]);
                narrow_sum[i] += part;
                narrow_dot[i] += part * centred;
            }
        }
#pragma omp simd
        for (int i = 0; i < n; ++i) {
            sum[i] += static_cast<double>(narrow_sum[i]);
            dot[i] += static_cast<double>(narrow_dot[i]);
        }
    }
    memcpy(total, sum, sizeof sum);
    memcpy(along, dot, sizeof dot);
}

// As column_sums, of a channel whose `count` positions are contiguous.
template <Activation activation, class T>
static void plane_sums(const T* x, const T* grad, int64_t count, const Parameters<1>& p, double* both) {
    const float mean = p.mean[0], scale = p.scale[0], shift = p.shift[0];
    double sum[kSumLanes] = {}, dot[kSumLanes] = {};
    for (int64_t first = 0; first < count; first += kNarrow * kSumLanes) {
        float narrow_sum[kSumLanes] = {}, narrow_dot[kSumLanes] = {};
        const int64_t last = smaller(first + kNarrow * kSumLanes, count);
        for (int64_t at = first; at < last; at += kSumLanes) {
            const int lanes = static_cast<int>(smaller(kSumLanes, last - at));
#pragma omp simd
            for (int i = 0; i < lanes; ++i) {
                const float centred = to_float(x[at + i]) - mean;
                const float part = passed<activation>(to_float(grad[at + i]), centred, scale, shift);
                narrow_sum[i] += part;
                narrow_dot[i] += part * centred;
            }
        }
        for (int i = 0; i < kSumLanes; ++i) {
            sum[i] += static_cast<double>(narrow_sum[i]);
            dot[i] += static_cast<double>(narrow_dot[i]);
        }
    }
    both[0] = total(sum);
    both[1] = total(dot);
}

template <Activation activation, class T>
static void sums_of(const NormGradientArgs& args, int threads) {
    const auto *x = static_cast<const T*>(args.x), *grad = static_cast<const T*>(args.grad);
    const int64_t channels = args.channels, width = args.channels_last ? kColumns : 1;
    const int64_t units = pieces(channels, width);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t unit = 0; unit < args.batch * units; ++unit) {
        const int64_t n = unit / units, first = unit % units * width, sample = n * channels * args.plane;
        double* const out = args.sums + 2 * n * channels + first;
        if (args.channels_last) {
            for_each_vector(smaller(width, channels - first), [&]<int k>(int64_t c, Width<k>) {
                const int64_t at = sample + first + c;
                column_sums<activation, k>(x + at, grad + at, args.plane, channels,
                                           Parameters<k>(args, n, first + c), out + c, out + channels + c);
            });
        } else {
            const int64_t at = sample + first * args.plane;
            double both[2];
            plane_sums<activation>(x + at, grad + at, args.plane, Parameters<1>(args, n, first), both);
            out[0] = both[0], out[channels] = both[1];
        }
    }
}

// The gradient at `rows` positions of n neighbouring channels, `stride` elements apart.
template <Activation activation, int n, class T>
static inline void gradient_columns(const T* x, const T* grad, T* out, int64_t rows, int64_t stride,
                                    const Parameters<n>& p) {
    float v[n], g[n];
    for (int64_t r = 0; r < rows; ++r) {
        load_into<n>(v, x + r * stride);
        load_into<n>(g, grad + r * stride);
#pragma omp simd
        for (int i = 0; i < n; ++i) {
            const float centred = v[i] - p.mean[i];
            const float part = passed<activation>(g[i], centred, p.scale[i], p.shift[i]);
            v[i] = fused(part, p.scale[i], fused(centred, p.slope[i], p.offset[i]));
        }
        store_lanes<n>(out + r * stride, load_bits<Lanes<float, n>>(v));
    }
}

template <Activation activation, class T>
static void gradient_plane(const T* x, const T* grad, T* out, int64_t count, const Parameters<1>& p) {
    const float mean = p.mean[0], scale = p.scale[0], shift = p.shift[0];
    const float slope = p.slope[0], offset = p.offset[0];
    for_each_vector(count, [=]<int n>(int64_t at, Width<n>) {
        float v[n], g[n];
        load_into<n>(v, x + at);
        load_into<n>(g, grad + at);
#pragma omp simd
        for (int i = 0; i < n; ++i) {
            const float centred = v[i] - mean;
            const float part = passed<activation>(g[i], centred, scale, shift);
            v[i] = fused(part, scale, fused(centred, slope, offset));
        }
        store_lanes<n>(out + at, load_bits<Lanes<float, n>>(v));
    });
}

template <Activation activation, class T>
static void gradient_of(const NormGradientArgs& args, int threads) {
    const auto *x = static_cast<const T*>(args.x), *grad = static_cast<const T*>(args.grad);
    T* const out = static_cast<T*>(args.out);
    const int64_t channels = args.channels, planes = args.channels_last ? 1 : channels;
    const int64_t pixel = channels / planes, rows = pixel < kElements ? kElements / pixel : 1;
    const int64_t units = pieces(args.plane, rows);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t unit = 0; unit < args.batch * planes * units; ++unit) {
        const int64_t plane = unit / units, n = plane / planes, first = unit % units * rows;
        const int64_t at = (plane * args.plane + first) * pixel, length = smaller(rows, args.plane - first);
        if (args.channels_last) {
            for_each_vector(channels, [&]<int k>(int64_t c, Width<k>) {
                gradient_columns<activation, k>(x + at + c, grad + at + c, out + at + c, length, channels,
                                                Parameters<k>(args, n, c));
            });
        } else {
            gradient_plane<activation>(x + at, grad + at, out + at, length,
                                       Parameters<1>(args, n, plane % planes));
        }
    }
}

template <class T>
static void run(const NormGradientArgs& args, int threads) {
    with_activation(args.activation, [&]<Activation a>(Activating<a>) {
        if (args.sums != nullptr) sums_of<a, T>(args, threads);
        if (args.out != nullptr) gradient_of<a, T>(args, threads);
    });
}

void norm_gradient(const NormGradientArgs& args, int threads) {
    (args.dtype == Dtype::kFloat32 ? run<float> : run<Bfloat16>)(args, threads);
}

}  // namespace ncsn_fast::NCSN_ISA

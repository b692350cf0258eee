// Activation, weighted sum, or both in one pass, on the CPU; the equation is in
// ncsn_fast/add_activation.h. Each map is read or written once: 2 to 4 accesses an element. Bound by
// memory, or by the exponential in cache.
#include "lanes.h"
#include "ncsn_fast/add_activation.h"

namespace ncsn_fast::NCSN_ISA {

constexpr int64_t kChunk = 4096;  // elements per unit of work

template <class T, bool add, bool weighted>
struct Sum {
    const T *a, *b;
    float a_weight, b_weight;

    template <int n>
    Lanes<float, n> at(int64_t i) const {
        Lanes<float, n> s = load_lanes<n>(a + i);
        if constexpr (weighted) s *= a_weight;
        if constexpr (add) {
            Lanes<float, n> other = load_lanes<n>(b + i);
            if constexpr (weighted) other *= b_weight;
            s += other;
        }
        return s;
    }
};

// Elements that are read from `first` on; the sum is written from `sum` on, and y from `y`.
struct Run {
    int64_t first, sum, y, count;
};

// keep: the sum is written; activate: y is.
template <class T, bool add, bool weighted, bool keep, bool activate, Activation activation>
static void write(const AddActivationArgs& args, const Run& run) {
    const int64_t count = run.count;
    Sum<T, add, weighted> s{static_cast<const T*>(args.a) + run.first, nullptr, args.a_weight, args.b_weight};
    if constexpr (add) s.b = static_cast<const T*>(args.b) + run.first;
    T *sum = nullptr, *y = nullptr;
    if constexpr (keep) sum = static_cast<T*>(args.sum) + run.sum;
    if constexpr (activate) y = static_cast<T*>(args.y) + run.y;
    for_each_vector(count, [=]<int n>(int64_t i, Width<n>) {
        const auto value = s.template at<n>(i);
        if constexpr (keep) store_lanes<n>(sum + i, value);
        if constexpr (activate) {
            const auto curve = [](float v) __attribute__((always_inline)) { return activated<activation>(v); };
            store_lanes<n>(y + i, each_lane<n>(value, curve));
        }
    });
}

template <class T, bool add, bool weighted>
static void write_run(const AddActivationArgs& args, const Run& run) {
    if (args.y == nullptr) {
        return write<T, add, weighted, true, false, Activation::kNone>(args, run);
    }
    with_activation(args.activation, [&]<Activation a>(Activating<a>) {
        if (args.sum != nullptr) return write<T, add, weighted, true, true, a>(args, run);
        write<T, add, weighted, false, true, a>(args, run);
    });
}

template <class T>
static void run(const AddActivationArgs& args, int threads) {
    const bool weighted = args.a_weight != 1.0f || args.b_weight != 1.0f;
    const auto write_each = args.b == nullptr
                                ? (weighted ? write_run<T, false, true> : write_run<T, false, false>)
                                : (weighted ? write_run<T, true, true> : write_run<T, true, false>);
    if (args.channels == 0 || args.count == 0) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t first = 0; first < args.count; first += kChunk) {
            write_each(args, {first, first, first, smaller(kChunk, args.count - first)});
        }
        return;
    }
    const PixelLayout &sum = args.sum_pixels, &y = args.y_pixels;
    const int64_t line = y.width * args.channels;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < args.count / line; ++row) {
        const int64_t image = row / y.height, of_image = row % y.height;
        const int64_t to_sum = image * sum.image + of_image * sum.row, to_y = image * y.image + of_image * y.row;
        for (int64_t w = 0; w < y.width; ++w) {
            const int64_t first = row * line + w * args.channels;
            write_each(args, {first, to_sum + w * sum.pixel, to_y + w * y.pixel, args.channels});
        }
    }
}

void add_activation(const AddActivationArgs& args, int threads) {
    (args.dtype == Dtype::kFloat32 ? run<float> : run<Bfloat16>)(args, threads);
}

}  // namespace ncsn_fast::NCSN_ISA

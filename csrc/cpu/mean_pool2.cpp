// Mean of 2x2 squares on the CPU; the equation is in ncsn_fast/mean_pool2.h. A unit of work is one
// output row; each input is read once and each output written once. Bound by memory.
#include "lanes.h"

namespace ncsn_fast::NCSN_ISA {

template <int n, bool add, class T>
static inline Lanes<float, n> element(const T* a, const T* b, int64_t at) {
    const auto v = load_lanes<n>(a + at);
    if constexpr (add) return v + load_lanes<n>(b + at);
    return v;
}

// `row` counts the output rows of all samples; a square's rows are then 2 row and 2 row + 1.
template <class T, bool add>
static void mean_pool2_row(const MeanPoolArgs& args, int64_t row) {
    const int64_t c = args.channels, below = args.width * c, width = args.width / 2;
    const int64_t start = 2 * row * below;
    const T *a = static_cast<const T*>(args.a) + start, *b = static_cast<const T*>(args.b);
    if constexpr (add) b += start;
    T* y = static_cast<T*>(args.y) + row * width * c;
    for (int64_t w = 0; w < width; ++w) {
        for_each_vector(c, [=]<int n>(int64_t i, Width<n>) {
            const int64_t at = 2 * w * c + i;
            const auto s00 = element<n, add>(a, b, at), s01 = element<n, add>(a, b, at + c);
            const auto s10 = element<n, add>(a, b, at + below);
            const auto s11 = element<n, add>(a, b, at + below + c);
            store_lanes<n>(y + w * c + i, mean_of_square(s00, s01, s10, s11));
        });
    }
}

template <class T>
static void run(const MeanPoolArgs& args, int threads) {
    const auto row = args.b == nullptr ? mean_pool2_row<T, false> : mean_pool2_row<T, true>;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < args.batch * (args.height / 2); ++r) row(args, r);
}

void mean_pool2(const MeanPoolArgs& args, int threads) {
    (args.dtype == Dtype::kFloat32 ? run<float> : run<Bfloat16>)(args, threads);
}

}  // namespace ncsn_fast::NCSN_ISA

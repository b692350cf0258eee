// Bilinear resize, added to a map or alone, on the CPU; the equation is in ncsn_fast/resize_add.h. A
// unit of work is one output row: a is read and y written once, and the rows of x that it lies between
// stay in cache. Bound by memory, or by the conversions of bfloat16 in cache.
#include "lanes.h"

namespace ncsn_fast::NCSN_ISA {

template <class T, bool add>
static void resize_row(const ResizeArgs& args, int64_t sample, int64_t row) {
    const int64_t c = args.channels, line = args.in_width * c;
    const Source v = source_of(row, args.in_height, args.out_height);
    const T* x = static_cast<const T*>(args.x) + sample * args.in_height * line;
    const T *low = x + v.low * line, *high = x + v.high * line;
    const int64_t start = (sample * args.out_height + row) * args.out_width * c;
    for (int64_t w = 0; w < args.out_width; ++w) {
        const Source h = source_of(w, args.in_width, args.out_width);
        const int64_t left = h.low * c, right = h.high * c, at = start + w * c;
        const T* a = static_cast<const T*>(args.a);
        if constexpr (add) a += at;
        T* y = static_cast<T*>(args.y) + at;
        for_each_vector(c, [=]<int n>(int64_t i, Width<n>) {
            const auto column = [=](int64_t at) {
                return between(load_lanes<n>(low + at), load_lanes<n>(high + at), v.weight);
            };
            auto value = between(column(left + i), column(right + i), h.weight);
            if constexpr (add) value += load_lanes<n>(a + i);
            store_lanes<n>(y + i, value);
        });
    }
}

template <class T>
static void run(const ResizeArgs& args, int threads) {
    const auto row = args.a == nullptr ? resize_row<T, false> : resize_row<T, true>;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < args.batch * args.out_height; ++r) {
        row(args, r / args.out_height, r % args.out_height);
    }
}

void resize_add(const ResizeArgs& args, int threads) {
    (args.dtype == Dtype::kFloat32 ? run<float> : run<Bfloat16>)(args, threads);
}

}  // namespace ncsn_fast::NCSN_ISA

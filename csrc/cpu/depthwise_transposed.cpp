// Transposed depthwise convolution on the CPU; the equation is in ncsn_fast/depthwise_transposed.h. A unit
// of work is a row of y; every output is written once. Bound by memory for the few taps of a filter: of
// `taps` only one in `stride` meets a pixel of x in each direction.
#include "lanes.h"
#include "ncsn_fast/depthwise_transposed.h"

namespace ncsn_fast::NCSN_ISA {

// The pixels first .. last of x that reach an output along one axis; `tap` is that of `first`, and one
// pixel further it is `stride` less.
struct Reach {
    int64_t first, last, tap;
};

static inline Reach reach(int64_t output, int64_t size, const DepthwiseTransposedArgs& args) {
    const int64_t at = output + args.padding;
    int64_t first = at < args.taps ? 0 : (at - args.taps) / args.stride + 1;
    int64_t last = at / args.stride;
    if (last >= size) last = size - 1;
    return {first, last, at - first * args.stride};
}

// `row` counts the rows of y of all samples.
template <class T>
static void run_row(const DepthwiseTransposedArgs& args, int64_t row) {
    const int64_t c = args.channels, line = args.width * c, stride = args.stride;
    const T* x = static_cast<const T*>(args.x) + row / args.out_height * args.height * line;
    T* y = static_cast<T*>(args.y) + row * args.out_width * c;
    const Reach down = reach(row % args.out_height, args.height, args);
    for (int64_t j = 0; j < args.out_width; ++j, y += c) {
        const Reach along = reach(j, args.width, args);
        for_each_vector(c, [=, &args]<int n>(int64_t i, Width<n>) {
            auto sum = args.bias == nullptr ? Lanes<float, n>{} : load_lanes<n>(args.bias + i);
            for (int64_t a = down.first, k = down.tap; a <= down.last; ++a, k -= stride) {
                for (int64_t b = along.first, l = along.tap; b <= along.last; ++b, l -= stride) {
                    sum += load_lanes<n>(args.weight + (k * args.taps + l) * c + i) *
                           load_lanes<n>(x + a * line + b * c + i);
                }
            }
            store_lanes<n>(y + i, sum);
        });
    }
}

template <class T>
static void run(const DepthwiseTransposedArgs& args, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < args.batch * args.out_height; ++row) run_row<T>(args, row);
}

void depthwise_transposed(const DepthwiseTransposedArgs& args, int threads) {
    (args.dtype == Dtype::kFloat32 ? run<float> : run<Bfloat16>)(args, threads);
}

}  // namespace ncsn_fast::NCSN_ISA

// ELU, sum, or both in one pass, on the CPU; the equation is in ncsn_fast/add_elu.h. Each map is read
// or written once: 2 to 4 accesses an element. Bound by memory, or by the exponential in cache.
#include "lanes.h"

namespace ncsn_fast::NCSN_ISA {

constexpr int64_t kChunk = 4096;  // elements per unit of work

template <class T, bool add, bool keep, bool elu>
static void add_elu_chunk(const AddEluArgs& args, int64_t first, int64_t count) {
    const T *a = static_cast<const T*>(args.a) + first, *b = static_cast<const T*>(args.b);
    T *sum = static_cast<T*>(args.sum), *y = static_cast<T*>(args.y);
    if constexpr (add) b += first;
    if constexpr (keep) sum += first;
    if constexpr (elu) y += first;
    for_each_vector(count, [=]<int n>(int64_t i, Width<n>) {
        auto s = load_lanes<n>(a + i);
        if constexpr (add) s += load_lanes<n>(b + i);
        if constexpr (keep) store_lanes<n>(sum + i, s);
        if constexpr (elu) store_lanes<n>(y + i, each_lane<n>(s, [](float v) { return elu_of(v); }));
    });
}

template <class T>
static void run(const AddEluArgs& args, int threads) {
    const auto chunk = args.b == nullptr     ? add_elu_chunk<T, false, false, true>
                       : args.sum == nullptr ? add_elu_chunk<T, true, false, true>
                       : args.y == nullptr   ? add_elu_chunk<T, true, true, false>
                                             : add_elu_chunk<T, true, true, true>;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < args.count; first += kChunk) {
        chunk(args, first, smaller(kChunk, args.count - first));
    }
}

void add_elu(const AddEluArgs& args, int threads) {
    (args.dtype == Dtype::kFloat32 ? run<float> : run<Bfloat16>)(args, threads);
}

}  // namespace ncsn_fast::NCSN_ISA

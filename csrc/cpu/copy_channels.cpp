// Copy of channels on the CPU; the equation is in ncsn_fast/copy_channels.h. Each element is read and
// written once. Bound by memory.
#include "lanes.h"
#include "ncsn_fast/copy_channels.h"

namespace ncsn_fast::NCSN_ISA {

constexpr int64_t kChunk = 4096;  // elements per unit of work

template <class In, class Out>
static void copy_pixels(const CopyChannelsArgs& args, int64_t first, int64_t count) {
    const In* x = static_cast<const In*>(args.x) + first * args.x_channels;
    Out* y = static_cast<Out*>(args.y) + first * args.y_channels;
    for (int64_t p = 0; p < count; ++p, x += args.x_channels, y += args.y_channels) {
        if constexpr (sizeof(In) == sizeof(Out)) {
            memcpy(y, x, static_cast<size_t>(args.channels) * sizeof(In));
        } else {
            for_each_vector(args.channels, [=]<int n>(int64_t i, Width<n>) {
                store_lanes<n>(y + i, load_lanes<n>(x + i));
            });
        }
    }
}

void copy_channels(const CopyChannelsArgs& args, int threads) {
    const bool wide_in = args.in_dtype == Dtype::kFloat32, wide_out = args.out_dtype == Dtype::kFloat32;
    const auto copy = wide_in ? (wide_out ? copy_pixels<float, float> : copy_pixels<float, Bfloat16>)
                              : (wide_out ? copy_pixels<Bfloat16, float> : copy_pixels<Bfloat16, Bfloat16>);
    const int64_t rows = kChunk / args.channels + 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < args.pixels; first += rows) {
        copy(args, first, smaller(rows, args.pixels - first));
    }
}

}  // namespace ncsn_fast::NCSN_ISA

// Squares of pixels from channels on the CPU; the equation is in ncsn_fast/depth_to_space.h. A unit of work
// is a row of y; each element is read and written once. Bound by memory.
#include "lanes.h"
#include "ncsn_fast/depth_to_space.h"

namespace ncsn_fast::NCSN_ISA {

// `row` counts the rows of y of all samples.
static void fill_row(const DepthToSpaceArgs& args, int64_t size, int64_t row) {
    const int64_t pixel = args.channels * size, apart = args.y_row * size;
    const int64_t s = args.factor, group = s * s * pixel;
    const int64_t at = row % args.out_height + args.first;
    const int64_t line = row / args.out_height * args.height + at / s;
    const auto* z = static_cast<const unsigned char*>(args.z) + line * args.width * group + at % s * s * pixel;
    auto* y = static_cast<unsigned char*>(args.y) + row * args.out_width * apart;
    const int64_t last = args.first + args.out_width;
    // The pixels of y of one pixel of z lie side by side in z, too.
    for (int64_t j = args.first; j < last;) {
        const int64_t end = smaller((j / s + 1) * s, last);
        copy_strided(z + j / s * group + j % s * pixel, y, end - j, pixel, pixel, apart);
        y += (end - j) * apart;
        j = end;
    }
}

void depth_to_space(const DepthToSpaceArgs& args, int threads) {
    const int64_t size = args.dtype == Dtype::kFloat32 ? sizeof(float) : sizeof(Bfloat16);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < args.batch * args.out_height; ++row) fill_row(args, size, row);
}

}  // namespace ncsn_fast::NCSN_ISA

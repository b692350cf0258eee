// Enlargement of a map on the CPU; the equation is in ncsn_fast/upsample_nearest.h. A unit of work is a row
// of x, which is read once; each output is written once. Bound by memory.
#include "lanes.h"
#include "ncsn_fast/upsample_nearest.h"

namespace ncsn_fast::NCSN_ISA {

// `row` counts the rows of all samples.
static void enlarge_row(const UpsampleArgs& args, int64_t size, int64_t row) {
    const int64_t pixel = args.channels * size, apart = args.y_row * size;
    const int64_t columns = args.width * args.columns, line = columns * apart;
    const auto* x = static_cast<const unsigned char*>(args.x) + row * args.width * pixel;
    auto* const first = static_cast<unsigned char*>(args.y) + row * args.rows * line;
    unsigned char* y = first;
    for (int64_t w = 0; w < args.width; ++w, x += pixel) {
        for (int64_t k = 0; k < args.columns; ++k, y += apart) memcpy(y, x, static_cast<size_t>(pixel));
    }
    for (int64_t r = 1; r < args.rows; ++r) copy_strided(first, first + r * line, columns, pixel, apart, apart);
}

void upsample_nearest(const UpsampleArgs& args, int threads) {
    const int64_t size = args.dtype == Dtype::kFloat32 ? sizeof(float) : sizeof(Bfloat16);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < args.batch * args.height; ++row) enlarge_row(args, size, row);
}

}  // namespace ncsn_fast::NCSN_ISA

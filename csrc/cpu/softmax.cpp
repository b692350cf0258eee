// Softmax on the CPU; the equation is in ncsn_fast/softmax.h. A unit of work is a row, in float32 in the
// workspace meanwhile. Sums run over elements in order: no bit depends on threads.
#include <omp.h>

#include "exponentiate.h"
#include "ncsn_fast/softmax.h"

namespace ncsn_fast::NCSN_ISA {

template <class T>
static void run_row(const SoftmaxArgs& args, int64_t row, float* scores, int64_t padded) {
    T* const x = static_cast<T*>(args.x) + row * args.columns;
    for_each_vector(args.columns, [=, &args]<int n>(int64_t i, Width<n>) {
        store_lanes<n>(scores + i, load_lanes<n>(x + i) * args.scale);
    });
    const float weight = 1.0f / exponentiate(scores, args.columns, padded);
    for_each_vector(args.columns, [=]<int n>(int64_t i, Width<n>) {
        store_lanes<n>(x + i, load_lanes<n>(scores + i) * weight);
    });
}

void softmax(const SoftmaxArgs& args, const SoftmaxWorkspace& workspace) {
    const auto run = args.dtype == Dtype::kFloat32 ? run_row<float> : run_row<Bfloat16>;
    const int64_t padded = workspace.slot_floats;
#pragma omp parallel for schedule(static) num_threads(workspace.threads)
    for (int64_t row = 0; row < args.rows; ++row) {
        run(args, row, workspace.data + omp_get_thread_num() * padded, padded);
    }
}

}  // namespace ncsn_fast::NCSN_ISA

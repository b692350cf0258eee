#include <cuda_runtime_api.h>

#include "group_norm_launch.h"
#include "kernels.h"

namespace ncsn_fast {

void group_norm_cuda(const GroupNormArgs& args, float* partials, float* coefficients, uintptr_t stream) {
    launch_group_norm(args, partials, coefficients,
                      Launcher{reinterpret_cast<cudaStream_t>(stream), "group_norm"});
}

}  // namespace ncsn_fast

#include <cuda_runtime_api.h>

#include "kernels.h"
#include "update_phases.h"

namespace ncsn_fast {

void sampler_update_cuda(const UpdateArgs& args, uintptr_t stream) {
    launch_update(args, Launcher{reinterpret_cast<cudaStream_t>(stream), "sampler_update"});
}

}  // namespace ncsn_fast

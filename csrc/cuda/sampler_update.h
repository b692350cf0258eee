// The CUDA backend, as seen by the bindings: no CUDA header needed to call it.
#pragma once

#include "ncsn_fast/sampler_update.h"

namespace ncsn_fast {

// Devices that can run kernels; 0 without a driver.
int cuda_device_count();

// Enqueues one row on `stream` (a cudaStream_t as an integer) of the current device; every pointer
// of `args` is a device pointer. std::runtime_error if the launch fails.
void sampler_update_cuda(const UpdateArgs& args, uintptr_t stream);

}  // namespace ncsn_fast

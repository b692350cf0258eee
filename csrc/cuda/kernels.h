// The CUDA backend, as seen by the bindings: no CUDA header needed to call it. Every pointer of the
// arguments is a device pointer; work is enqueued on `stream` (a cudaStream_t as an integer) of the
// current device. std::runtime_error if a launch fails, std::invalid_argument for what is not supported.
#pragma once

#include "ncsn_fast/group_norm.h"
#include "ncsn_fast/instance_norm_plus.h"
#include "ncsn_fast/sampler_update.h"

namespace ncsn_fast {

// Devices that can run kernels; 0 without a driver.
int cuda_device_count();

void sampler_update_cuda(const UpdateArgs& args, uintptr_t stream);

// partials: float32 (batch, norm_tiles, 2, channels), not read where single is true.
void instance_norm_plus_cuda(const NormArgs& args, float* partials, bool single, uintptr_t stream);

// As well; coefficients: float32 (batch, 3, channels), which the launch fills and reads.
void group_norm_cuda(const GroupNormArgs& args, float* partials, float* coefficients, uintptr_t stream);

// The same kernels run by the CPU, thread after thread, on host pointers; `backward` reverses the order
// of the threads, which must change nothing.
void emulated_sampler_update(const UpdateArgs& args, bool backward);
void emulated_instance_norm_plus(const NormArgs& args, float* partials, bool single, bool backward);
void emulated_group_norm(const GroupNormArgs& args, float* partials, float* coefficients, bool backward);

// Tiles of pixels into which the statistics of a map are split.
int64_t norm_tiles(int64_t channels, int64_t plane, Dtype dtype);

}  // namespace ncsn_fast

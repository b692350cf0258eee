// Kernels in phases, so that the same code runs on a GPU and, one thread after another, on the CPU.
//
// A kernel is a struct with its arguments and a function `run(Phase<p>, block, thread, shared)` for each
// of its kPhases: the work of a thread between two barriers. `shared` holds all state between phases.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "ncsn_fast/platform.h"

namespace ncsn_fast {

template <int p>
struct Phase {};

struct NoShared {};

// Runs blocks one after another. Shared memory starts as NaNs; `backward` reverses the order of a
// phase's threads, which changes nothing unless one reads what another writes.
struct Emulator {
    bool backward;

    template <class Kernel>
    void operator()(const Kernel& kernel, int64_t blocks) const {
        const auto shared = std::make_unique<typename Kernel::Shared>();
        for (int64_t block = 0; block < blocks; ++block) {
            std::memset(static_cast<void*>(shared.get()), 0xff, sizeof *shared);
            run_from<0>(kernel, block, *shared);
        }
    }

  private:
    template <int p, class Kernel>
    void run_from(const Kernel& kernel, int64_t block, typename Kernel::Shared& shared) const {
        for (int t = 0; t < Kernel::kThreads; ++t) {
            kernel.run(Phase<p>{}, block, backward ? Kernel::kThreads - 1 - t : t, shared);
        }
        if constexpr (p + 1 < Kernel::kPhases) run_from<p + 1>(kernel, block, shared);
    }
};

#if defined(__CUDACC__)

template <int p, class Kernel>
__device__ __forceinline__ void run_phases(const Kernel& kernel, typename Kernel::Shared& shared) {
    kernel.run(Phase<p>{}, blockIdx.x, static_cast<int>(threadIdx.x), shared);
    if constexpr (p + 1 < Kernel::kPhases) {
        __syncthreads();
        run_phases<p + 1>(kernel, shared);
    }
}

// Resident threads per multiprocessor; with more, ptxas would spill registers. A kernel that needs more
// registers has its own kResident.
template <class Kernel>
constexpr int resident_threads() {
    if constexpr (requires { Kernel::kResident; }) return Kernel::kResident;
    return 768;
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, resident_threads<Kernel>() / Kernel::kThreads)
    phases_kernel(const __grid_constant__ Kernel kernel) {
    __shared__ typename Kernel::Shared shared;
    run_phases<0>(kernel, shared);
}

// Enqueues on a stream of the current device.
struct Launcher {
    cudaStream_t stream;
    const char* name;  // for errors

    template <class Kernel>
    void operator()(const Kernel& kernel, int64_t blocks) const {
        if (blocks > 0x7fffffffll) {
            throw std::invalid_argument(std::string(name) + " would take " + std::to_string(blocks) +
                                        " blocks, a launch has at most 2**31 - 1; use a smaller batch");
        }
        phases_kernel<<<static_cast<unsigned>(blocks), Kernel::kThreads, 0, stream>>>(kernel);
        const cudaError_t error = cudaGetLastError();
        if (error != cudaSuccess) {
            throw std::runtime_error(std::string(name) + ", " + std::to_string(blocks) +
                                     " blocks: " + cudaGetErrorString(error));
        }
    }
};

#endif

inline bool aligned(const void* p, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

}  // namespace ncsn_fast

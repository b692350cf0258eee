// Chooses the instruction-set level and the number of threads of a CPU call, and owns its buffers.
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace ncsn_fast {

namespace scalar {
extern const Kernels kKernels;
}
#if defined(NCSN_X86_LEVELS)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

namespace {

constexpr int64_t kElementsPerThread = 16384;  // below this a second thread costs more than it brings
constexpr int64_t kTileElements = 8192;        // 32 KiB of float32: read twice from the L1 or L2 cache
constexpr int64_t kMaxTileRows = 512;          // bounds sequential float32 sums, channels last

const Kernels& kernels(int isa) {
    switch (resolve_isa(isa)) {
#if defined(NCSN_X86_LEVELS)
        case Isa::kAvx512:
            return avx512::kKernels;
        case Isa::kAvx2:
            return avx2::kKernels;
#endif
        default:
            return scalar::kKernels;
    }
}

int threads_for(int64_t elements, int64_t pieces) {
    const int64_t useful = std::min(elements / kElementsPerThread + 1, pieces);
    return static_cast<int>(std::clamp<int64_t>(useful, 1, omp_get_max_threads()));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_samples(const int64_t* samples, int64_t batch) {
    for (int64_t i = 0; i < batch; ++i) {
        if (samples[i] < 0 || samples[i] > 0xffffffffll) {
            throw std::invalid_argument("sample indices must be in [0, 2**32); got samples[" +
                                        std::to_string(i) + "] = " + std::to_string(samples[i]));
        }
    }
}

}  // namespace

NormPlan::NormPlan(int64_t channels, int64_t plane, bool channels_last) {
    const int64_t rows = std::clamp<int64_t>(kTileElements / channels, 1, kMaxTileRows);
    tile_size = channels_last ? rows : kTileElements;
    tiles = ceil_div(plane, tile_size);
    units = channels_last ? tiles : channels * tiles;
    slot_floats = ceil_div((7 + 3 * tiles) * channels, 32) * 32;
}

bool isa_compiled(Isa isa) {
#if defined(NCSN_X86_LEVELS)
    return isa >= Isa::kScalar && isa <= Isa::kAvx512;
#else
    return isa == Isa::kScalar;
#endif
}

bool isa_supported(Isa isa) {
    if (!isa_compiled(isa)) return false;
#if defined(NCSN_X86_LEVELS)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == Isa::kAvx2) return avx2;
    if (isa == Isa::kAvx512) {
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    }
#endif
    return true;
}

const char* isa_name(Isa isa) {
    return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "scalar";
}

Isa resolve_isa(int isa) {
    static const Isa best = isa_supported(Isa::kAvx512) ? Isa::kAvx512
                            : isa_supported(Isa::kAvx2) ? Isa::kAvx2
                                                        : Isa::kScalar;
    if (isa == -1) return best;
    if (!isa_supported(static_cast<Isa>(isa))) {
        throw std::invalid_argument("instruction-set level " + std::to_string(isa) +
                                    " is not available here; the best one is " + isa_name(best));
    }
    return static_cast<Isa>(isa);
}

void box_muller_cpu(const uint32_t* words, int64_t pairs, float* out, int isa) {
    kernels(isa).box_muller(words, pairs, out);
}

void fill_noise(NoiseKind kind, const NoiseArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    check_samples(args.samples, args.batch);
    if (args.batch == 0 || args.numel == 0) return;
    const int64_t elements = args.batch * args.numel;
    chosen.noise(kind, args, threads_for(elements, elements));
}

void instance_norm_plus_cpu(const NormArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    if (args.batch == 0 || args.channels == 0 || args.plane == 0) return;
    const NormPlan plan(args.channels, args.plane, args.channels_last);
    const int64_t elements = args.batch * args.channels * args.plane;
    const int threads = threads_for(elements, args.batch * plan.units);
    thread_local std::vector<unsigned char> buffer;  // kept between calls; one slot a thread
    const size_t bytes = static_cast<size_t>(threads * plan.slot_floats) * sizeof(float) + 64;
    if (buffer.size() < bytes) buffer.resize(bytes);
    const auto address = reinterpret_cast<uintptr_t>(buffer.data());
    auto* aligned = reinterpret_cast<float*>((address + 63) / 64 * 64);
    chosen.instance_norm_plus(args, plan, {aligned, threads});
}

void sampler_update_cpu(const UpdateArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    check_samples(args.samples, args.batch);
    const int64_t elements = args.batch * args.channels * args.plane;
    if (elements == 0) return;
    chosen.sampler_update(args, threads_for(elements, elements));
}

void add_elu_cpu(const AddEluArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    chosen.add_elu(args, threads_for(args.count, args.count));
}

void pool5_cpu(PoolKind kind, const PoolArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    const int64_t elements = args.batch * args.channels * args.height * args.width;
    if (elements == 0) return;
    chosen.pool5(kind, args, threads_for(elements, elements));
}

void mean_pool2_cpu(const MeanPoolArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    const int64_t rows = args.batch * (args.height / 2);
    chosen.mean_pool2(args, threads_for(2 * rows * args.width * args.channels, rows));
}

void resize_add_cpu(const ResizeArgs& args, int isa) {
    const Kernels& chosen = kernels(isa);
    const int64_t rows = args.batch * args.out_height;
    chosen.resize_add(args, threads_for(rows * args.out_width * args.channels, rows));
}

void zero_cpu(void* memory, int64_t bytes) {
    constexpr int64_t kChunk = 1 << 16;
    const int threads = threads_for(bytes / static_cast<int64_t>(sizeof(float)), ceil_div(bytes, kChunk));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < bytes; first += kChunk) {
        std::memset(static_cast<char*>(memory) + first, 0, static_cast<size_t>(std::min(kChunk, bytes - first)));
    }
}

}  // namespace ncsn_fast

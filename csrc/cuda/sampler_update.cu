// One row of a sampler table on the GPU: state, history, noise, known pixels and the network's next
// input in one pass. The equation is in ncsn_fast/sampler_update.h.
//
// One thread per quadruple of elements, which is what one Philox call serves. Contiguous tensors are
// read and written 16 bytes at a time where every sample starts on such a boundary. 12 to 24 bytes an
// element; bound by memory.
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "ncsn_fast/normal.h"
#include "ncsn_fast/philox.h"
#include "sampler_update.h"

namespace ncsn_fast {
namespace {

constexpr int kThreads = 256;

struct Quad {
    float v[4];
};

struct alignas(8) Bfloat16x4 {
    Bfloat16 v[4];
};

// Where a thread works: elements [first, first + count) of `sample`.
struct Place {
    int64_t sample, first;
    int count;
};

template <bool wide>
__device__ Quad load_quad(const float* p, const Place& at) {
    if constexpr (wide) {
        const float4 v = *reinterpret_cast<const float4*>(p + at.first);
        return {v.x, v.y, v.z, v.w};
    } else {
        Quad out{};
        for (int i = 0; i < at.count; ++i) out.v[i] = p[at.first + i];
        return out;
    }
}

template <bool wide>
__device__ void store_quad(float* p, const Place& at, const Quad& q) {
    if constexpr (wide) {
        *reinterpret_cast<float4*>(p + at.first) = make_float4(q.v[0], q.v[1], q.v[2], q.v[3]);
    } else {
        for (int i = 0; i < at.count; ++i) p[at.first + i] = q.v[i];
    }
}

template <bool wide, class In>
__device__ Quad load_network_output(const UpdateArgs& args, const Place& at) {
    const In* f = static_cast<const In*>(args.f) + at.sample * args.channels * args.plane;
    Quad out{};
    if constexpr (wide && sizeof(In) == sizeof(float)) {
        if (!args.f_channels_last) return load_quad<true>(f, at);
    } else if constexpr (wide) {
        if (!args.f_channels_last) {
            const Bfloat16x4 v = *reinterpret_cast<const Bfloat16x4*>(f + at.first);
            for (int i = 0; i < 4; ++i) out.v[i] = to_float(v.v[i]);
            return out;
        }
    }
    for (int i = 0; i < at.count; ++i) {
        out.v[i] = to_float(f[offset_of(at.first + i, args.channels, args.plane, args.f_channels_last)]);
    }
    return out;
}

template <class Out>
__device__ void store_net_input(const UpdateArgs& args, const Place& at, const Quad& x) {
    Out* to = static_cast<Out*>(args.net_input) + at.sample * args.channels * args.plane;
    for (int i = 0; i < at.count; ++i) {
        const int64_t offset = offset_of(at.first + i, args.channels, args.plane, args.net_channels_last);
        store(to + offset, fused(args.scale, x.v[i], args.shift));
    }
}

__device__ Quad normal_quad(const UpdateArgs& args, const Place& at, uint32_t stream, uint32_t step) {
    const NoiseKey key{args.seed, static_cast<uint32_t>(args.samples[at.sample]), stream, step};
    const Words w = noise_words(key, static_cast<uint32_t>(at.first / 4));
    const NormalPair low = box_muller(w.w0, w.w1), high = box_muller(w.w2, w.w3);
    return {low.first, low.second, high.first, high.second};
}

__device__ Quad row_noise(const UpdateArgs& args, const Place& at) {
    Quad z = normal_quad(args, at, kSamplerStream, args.row.step);
    if (args.noise_weights == nullptr) return z;
    const Quad second = normal_quad(args, at, kSecondStream, args.row.step);
    const float w0 = args.noise_weights[2 * at.sample], w1 = args.noise_weights[2 * at.sample + 1];
    for (int i = 0; i < 4; ++i) z.v[i] = fused(w1, second.v[i], w0 * z.v[i]);
    return z;
}

__device__ void impose_known(const UpdateArgs& args, const Place& at, Quad& x) {
    const Row& row = args.row;
    const int64_t base = at.sample * args.channels * args.plane + at.first;
    const Quad z = row.c_ref != 0.0f ? normal_quad(args, at, kReferenceStream, row.ref_step) : Quad{};
    for (int i = 0; i < at.count; ++i) {
        if (args.mask[base + i]) x.v[i] = fused(row.c_ref, z.v[i], args.known[base + i]);
    }
}

template <bool wide, class In>
__global__ void __launch_bounds__(kThreads) update_kernel(UpdateArgs args, int64_t quads) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (thread >= args.batch * quads) return;
    const int64_t numel = args.channels * args.plane, first = thread % quads * 4;
    const Place at{thread / quads, first, static_cast<int>(numel - first < 4 ? numel - first : 4)};
    const Row& row = args.row;
    float* state = args.x + at.sample * numel;
    const Quad x = load_quad<wide>(state, at), f = load_network_output<wide, In>(args, at);
    Quad next;
    for (int i = 0; i < 4; ++i) next.v[i] = updated_state(row, x.v[i], f.v[i]);
    if (args.h != nullptr) {
        float* history = args.h + at.sample * numel;
        Quad h = load_quad<wide>(history, at);
        for (int i = 0; i < 4; ++i) {
            next.v[i] = fused(row.g, h.v[i], next.v[i]);
            h.v[i] = updated_history(row, x.v[i], f.v[i]);
        }
        store_quad<wide>(history, at, h);
    }
    if (row.c != 0.0f) {
        const Quad z = row_noise(args, at);
        for (int i = 0; i < 4; ++i) next.v[i] = fused(row.c, z.v[i], next.v[i]);
    }
    if (args.mask != nullptr && row.c_ref == row.c_ref) impose_known(args, at, next);
    store_quad<wide>(state, at, next);
    if (args.net_input != nullptr) {
        args.net_dtype == Dtype::kFloat32 ? store_net_input<float>(args, at, next)
                                          : store_net_input<Bfloat16>(args, at, next);
    }
    bool bad = false;
    for (int i = 0; i < at.count; ++i) bad = bad || is_nonfinite(next.v[i]);
    if (bad && args.nonfinite != nullptr) args.nonfinite[at.sample] = 1;  // all writers write 1
}

bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <bool wide>
void launch(const UpdateArgs& args, cudaStream_t stream) {
    const int64_t quads = (args.channels * args.plane + 3) / 4;
    const auto blocks = static_cast<unsigned>((args.batch * quads + kThreads - 1) / kThreads);
    if (args.f_dtype == Dtype::kFloat32) {
        update_kernel<wide, float><<<blocks, kThreads, 0, stream>>>(args, quads);
    } else {
        update_kernel<wide, Bfloat16><<<blocks, kThreads, 0, stream>>>(args, quads);
    }
}

}  // namespace

void sampler_update_cuda(const UpdateArgs& args, uintptr_t stream_handle) {
    const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
    const int64_t numel = args.channels * args.plane;
    if (args.batch * numel == 0) return;
    const bool wide = numel % 4 == 0 && aligned(args.x, 16) && aligned(args.h, 16) && aligned(args.f, 16);
    wide ? launch<true>(args, stream) : launch<false>(args, stream);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
        throw std::runtime_error("sampler_update of " + std::to_string(args.batch) + " x " +
                                 std::to_string(numel) + " elements: " + cudaGetErrorString(error));
    }
}

}  // namespace ncsn_fast

// One row of a sampler table on the CPU: state, history, noise, known pixels and the network's next
// input in one pass. The equation is in ncsn_fast/sampler_update.h; float32 state, 12 to 24 bytes an
// element; bound by the arithmetic of the noise where there is any.
#include "noise_block.h"

namespace ncsn_fast::NCSN_ISA {

// Calls run(offset in the block, count, offset in memory) for each stretch of elements [first,
// first + count) that lies in one channel, where memory advances by layout.pixel.
template <class Run>
static inline void for_each_stretch(const UpdateArgs& args, const MapLayout& layout, int64_t first,
                                    int64_t count, Run run) {
    for (int64_t done = 0; done < count;) {
        const int64_t position = (first + done) % args.plane;
        const int64_t length = smaller(count - done, args.plane - position);
        run(done, length, offset_of(first + done, args.plane, layout));
        done += length;
    }
}

template <class In>
static void gather(const UpdateArgs& args, int64_t sample, int64_t first, int64_t count, float* out) {
    const MapLayout& layout = args.f_layout;
    const In* f = static_cast<const In*>(args.f) + sample * layout.sample;
    if (in_order(layout, args.channels, args.plane)) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) out[i] = to_float(f[first + i]);
        return;
    }
    for_each_stretch(args, layout, first, count, [&](int64_t at, int64_t length, int64_t memory) {
        for (int64_t i = 0; i < length; ++i) out[at + i] = to_float(f[memory + i * layout.pixel]);
    });
}

template <class Out>
static void scatter_input(const UpdateArgs& args, int64_t sample, int64_t first, int64_t count,
                          const float* x) {
    const MapLayout& layout = args.net_layout;
    Out* to = static_cast<Out*>(args.net_input) + sample * layout.sample;
    if (layout.channels == args.channels && in_order(layout, args.channels, args.plane)) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) store(to + first + i, network_input(args.row, x[i]));
        return;
    }
    for_each_stretch(args, layout, first, count, [&](int64_t at, int64_t length, int64_t memory) {
        for (int64_t i = 0; i < length; ++i) {
            store(to + memory + i * layout.pixel, network_input(args.row, x[at + i]));
        }
        if (first + at >= args.plane) return;  // the first channel fills what the state lacks
        for (int64_t c = args.channels; c < layout.channels; ++c) {
            Out* pad = to + memory + c * layout.channel;
            for (int64_t i = 0; i < length; ++i) store(pad + i * layout.pixel, 0.0f);
        }
    });
}

static void gather_as(const UpdateArgs& args, int64_t sample, int64_t first, int64_t count, float* out) {
    const Dtype dtype = args.f_layout.dtype;
    (dtype == Dtype::kFloat32    ? gather<float>
     : dtype == Dtype::kBfloat16 ? gather<Bfloat16>
                                 : gather<Float16>)(args, sample, first, count, out);
}

static void scatter_as(const UpdateArgs& args, int64_t sample, int64_t first, int64_t count,
                       const float* x) {
    const Dtype dtype = args.net_layout.dtype;
    (dtype == Dtype::kFloat32    ? scatter_input<float>
     : dtype == Dtype::kBfloat16 ? scatter_input<Bfloat16>
                                 : scatter_input<Float16>)(args, sample, first, count, x);
}

// z of the row for the block at `first`: one field, or two weighted ones.
static void row_noise(const UpdateArgs& args, int64_t sample, int64_t first, float* z) {
    NoiseKey key{seed_of(args, sample), static_cast<uint32_t>(args.samples[sample]), kSamplerStream,
                 args.row.step};
    const int64_t quads = smaller(kBlockQuads, (args.channels * args.plane - first + 3) / 4);
    normal_block(key, first / 4, quads, z);
    if (args.noise_weights == nullptr) return;
    alignas(64) float second[kBlock];
    key.stream = kSecondStream;
    normal_block(key, first / 4, quads, second);
    const float w0 = args.noise_weights[2 * sample], w1 = args.noise_weights[2 * sample + 1];
#pragma omp simd
    for (int64_t i = 0; i < 4 * quads; ++i) z[i] = fused(w1, second[i], w0 * z[i]);
}

static void impose_known(const UpdateArgs& args, int64_t sample, int64_t first, int64_t count, float* x) {
    alignas(64) float z[kBlock] = {};
    if (args.row.c_ref != 0.0f) {
        const NoiseKey key{seed_of(args, sample), static_cast<uint32_t>(args.samples[sample]),
                           kReferenceStream, args.row.ref_step};
        normal_block(key, first / 4, (count + 3) / 4, z);
    }
    const int64_t base = sample * args.channels * args.plane + first;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        const float noised = fused(args.row.c_ref, z[i], args.known[base + i]);
        x[i] = args.mask[base + i] != 0 ? noised : x[i];
    }
}

static bool any_nonfinite(const float* x, int64_t count) {
    uint32_t found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t i = 0; i < count; ++i) found |= is_nonfinite(x[i]) ? 1u : 0u;
    return found != 0;
}

static void update_block(const UpdateArgs& args, int64_t sample, int64_t first) {
    const Row& row = args.row;
    const int64_t numel = args.channels * args.plane;
    const int64_t count = smaller(kBlock, numel - first);
    float* x = args.x + sample * numel + first;
    alignas(64) float f[kBlock], next[kBlock], z[kBlock];
    gather_as(args, sample, first, count, f);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) next[i] = updated_state(row, x[i], f[i]);
    if (args.h != nullptr) {
        float* h = args.h + sample * numel + first;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
            next[i] = fused(row.g, h[i], next[i]);
            h[i] = updated_history(row, x[i], f[i]);
        }
    }
    if (row.c != 0.0f) {
        row_noise(args, sample, first, z);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) next[i] = fused(row.c, z[i], next[i]);
    }
    if (args.mask != nullptr && row.c_ref == row.c_ref) impose_known(args, sample, first, count, next);
    memcpy(x, next, 4 * count);
    if (args.net_input != nullptr) {
        scatter_as(args, sample, first, count, next);
    }
    if (args.nonfinite != nullptr && any_nonfinite(next, count)) {
        __atomic_store_n(args.nonfinite + sample, 1, __ATOMIC_RELAXED);
    }
}

void sampler_update(const UpdateArgs& args, int threads) {
    const int64_t blocks = (args.channels * args.plane + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < args.batch * blocks; ++t) {
        update_block(args, t / blocks, t % blocks * kBlock);
    }
}

}  // namespace ncsn_fast::NCSN_ISA

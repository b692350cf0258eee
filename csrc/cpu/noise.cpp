// Words, uniforms and normals of the noise contract, for many samples at once.
#include "noise_block.h"

namespace ncsn_fast::NCSN_ISA {

// Up to kBlock elements from quadruple `first`; only elements below `numel` are written.
static void fill_block(NoiseKind kind, const NoiseArgs& args, int64_t index, int64_t first) {
    const int64_t quads_total = (args.numel + 3) / 4;
    const int64_t quads = smaller(kBlockQuads, quads_total - first);
    const NoiseKey key{args.seed, static_cast<uint32_t>(args.samples[index]), args.stream, args.step};
    alignas(64) uint32_t words[kBlock];
    block_words(key, first, quads, words);
    if (kind == NoiseKind::kWords) {
        memcpy(static_cast<uint32_t*>(args.out) + 4 * (index * quads_total + first), words, 16 * quads);
        return;
    }
    alignas(64) float values[kBlock];
    if (kind == NoiseKind::kUniform) {
        block_uniforms(words, 4 * quads, values);
    } else {
        block_normals(words, 2 * quads, values);
    }
    const int64_t count = smaller(4 * quads, args.numel - 4 * first);
    memcpy(static_cast<float*>(args.out) + index * args.numel + 4 * first, values, 4 * count);
}

void box_muller_pairs(const uint32_t* words, int64_t pairs, float* out) {
    block_normals(words, pairs, out);
}

void noise(NoiseKind kind, const NoiseArgs& args, int threads) {
    const int64_t blocks = (args.numel + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < args.batch * blocks; ++t) {
        fill_block(kind, args, t / blocks, t % blocks * kBlockQuads);
    }
}

}  // namespace ncsn_fast::NCSN_ISA

// Noise of a run of elements, in arrays that stay in the first-level cache.
#pragma once

#include "level.h"
#include "ncsn_fast/normal.h"
#include "ncsn_fast/philox.h"

namespace ncsn_fast::NCSN_ISA {

constexpr int kBlockQuads = 128;
constexpr int kBlock = 4 * kBlockQuads;

// Words of `quads` <= kBlockQuads quadruples from `first`, four to each.
static inline void block_words(NoiseKey key, int64_t first, int64_t quads, uint32_t* out) {
#pragma omp simd
    for (int64_t i = 0; i < quads; ++i) {
        const Words w = noise_words(key, static_cast<uint32_t>(first + i));
        out[4 * i] = w.w0;
        out[4 * i + 1] = w.w1;
        out[4 * i + 2] = w.w2;
        out[4 * i + 3] = w.w3;
    }
}

// Uniforms from `count` words.
static inline void block_uniforms(const uint32_t* words, int64_t count, float* out) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = uniform_from_word(words[i]);
}

// Normals from `pairs` pairs of words.
static inline void block_normals(const uint32_t* words, int64_t pairs, float* out) {
#pragma omp simd
    for (int64_t i = 0; i < pairs; ++i) {
        const NormalPair z = box_muller(words[2 * i], words[2 * i + 1]);
        out[2 * i] = z.first;
        out[2 * i + 1] = z.second;
    }
}

// Standard normals of elements [4 first, 4 (first + quads)).
static inline void normal_block(NoiseKey key, int64_t first, int64_t quads, float* out) {
    alignas(64) uint32_t words[kBlock];
    block_words(key, first, quads, words);
    block_normals(words, 2 * quads, out);
}

}  // namespace ncsn_fast::NCSN_ISA

// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
//
//   key     = (seed, sample index)
//   counter = (element / 4, step, stream, 0)          element counted in C, H, W order
//
// Four 32-bit words for elements 4q .. 4q+3. The contract is stated in ncsn_fast/ops/noise.py.
#pragma once

#include "ncsn_fast/platform.h"

namespace ncsn_fast {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;

struct Words {
    uint32_t w0, w1, w2, w3;
};

// Identifies a noise field: everything but the element.
struct NoiseKey {
    uint32_t seed, sample, stream, step;
};

NCSN_HD uint32_t multiply_high(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

NCSN_HD Words philox4x32(Words counter, uint32_t key0, uint32_t key1) {
    Words c = counter;
    NCSN_UNROLL
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint32_t high0 = multiply_high(kPhiloxMultiplier0, c.w0);
        const uint32_t high1 = multiply_high(kPhiloxMultiplier1, c.w2);
        c = {high1 ^ c.w1 ^ key0, kPhiloxMultiplier1 * c.w2, high0 ^ c.w3 ^ key1,
             kPhiloxMultiplier0 * c.w0};
        key0 += kPhiloxWeyl0;
        key1 += kPhiloxWeyl1;
    }
    return c;
}

NCSN_HD Words noise_words(NoiseKey key, uint32_t quad) {
    return philox4x32({quad, key.step, key.stream, 0u}, key.seed, key.sample);
}

// (w >> 8) * 2^-24, in [0, 1).
NCSN_HD float uniform_from_word(uint32_t w) {
    return static_cast<float>(static_cast<int32_t>(w >> 8)) * 0x1p-24f;
}

}  // namespace ncsn_fast

// The exponentials of a softmax.
#pragma once

#include "lanes.h"
#include "ncsn_fast/elementary.h"

namespace ncsn_fast::NCSN_ISA {

// Replaces scores by their exponentials, less the largest score; returns their sum. `padded` is `count`
// rounded up to kSumLanes.
static inline float exponentiate(float* scores, int64_t count, int64_t padded) {
    constexpr int kVectors = kSumLanes / kLanes;
    for (int64_t i = count; i < padded; ++i) scores[i] = -__builtin_inff();
    Vec largest = load_lanes<kLanes>(scores);
    for (int64_t i = kLanes; i < padded; i += kLanes) {
        const Vec v = load_lanes<kLanes>(scores + i);
        largest = v > largest ? v : largest;
    }
    float lane[kLanes], most = -__builtin_inff();
    memcpy(lane, &largest, sizeof lane);
    for (int i = 0; i < kLanes; ++i) most = lane[i] > most ? lane[i] : most;
    const auto exponential = [](float v) __attribute__((always_inline)) { return exp_nonpositive(v); };
    Vec sum[kVectors] = {};
    for (int64_t i = 0; i < padded; i += kSumLanes) {
        NCSN_UNROLL
        for (int k = 0; k < kVectors; ++k) {
            const Vec away = load_lanes<kLanes>(scores + i + k * kLanes) - most;
            const Vec value = each_lane<kLanes>(away, exponential);
            store_lanes<kLanes>(scores + i + k * kLanes, value);
            sum[k] += value;
        }
    }
    float lanes[kSumLanes];
    memcpy(lanes, sum, sizeof lanes);
    return total(lanes);
}

}  // namespace ncsn_fast::NCSN_ISA

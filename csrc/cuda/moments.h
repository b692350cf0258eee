// Mean and sum of squares about it, of values and of sets of values.
//
// Values are summed as differences from the first value, sets as differences from the mean found so far;
// the sum of the differences corrects mean and squares. Equal values give exactly that value and 0.
#pragma once

#include "ncsn_fast/platform.h"

namespace ncsn_fast {

struct Moments {
    float mean, squares;
};

// From sums over values of their differences from `mean`, and of the squares of these; share is 1 / count.
NCSN_HD Moments corrected(float mean, float rest, float squares, float share) {
    const float correction = rest * share;
    const float left = fused(-rest, correction, squares);
    return {mean + correction, left < 0.0f ? 0.0f : left};
}

// Of two sets together (Chan et al. 1979): `count` values with moments a, then `more` with b.
NCSN_HD Moments merged_pair(Moments a, float count, Moments b, float more) {
    if (count == 0.0f) return b;
    const float share = more / (count + more), delta = b.mean - a.mean;
    return {fused(delta, share, a.mean), fused(delta * delta, count * share, a.squares + b.squares)};
}

// Of sets 0 .. sets - 1 together, `total` values; set 0 is not empty.
template <class Count, class Mean, class Squares>
NCSN_HD Moments merged(int sets, float total, Count count, Mean mean, Squares squares) {
    const float first = mean(0), share = 1.0f / total;
    float sum = 0.0f, rest = 0.0f, all = 0.0f;
    for (int i = 0; i < sets; ++i) sum = fused(mean(i) - first, count(i), sum);
    const float centre = fused(sum, share, first);
    for (int i = 0; i < sets; ++i) {
        const float d = mean(i) - centre, weighted = d * count(i);
        rest += weighted;
        all = fused(d, weighted, all + squares(i));
    }
    return corrected(centre, rest, all, share);
}

// As merged, of sets of `each` values, the last of `last`. Means, and squares unless null, are `stride`
// apart in memory, which is read once, eight sets at a time: differences are from the first mean alone.
NCSN_HD Moments merged_once(int sets, float each, float last, float share, const float* means,
                            const float* squares, int64_t stride) {
    constexpr int kAtOnce = 8;
    const float first = *means;
    float rest = 0.0f, between = 0.0f, within = 0.0f;
    NCSN_NO_UNROLL
    for (int left = sets; left > 0; left -= kAtOnce) {
        float mean[kAtOnce] = {}, own[kAtOnce] = {};
        NCSN_UNROLL
        for (int i = 0; i < kAtOnce; ++i, means += stride) {
            if (i < left) mean[i] = *means;
        }
        if (squares != nullptr) {
            NCSN_UNROLL
            for (int i = 0; i < kAtOnce; ++i, squares += stride) {
                if (i < left) own[i] = *squares;
            }
        }
        NCSN_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            const float count = i + 1 < left ? each : i + 1 == left ? last : 0.0f;
            const float d = mean[i] - first, weighted = d * count;
            rest += weighted;
            between = fused(d, weighted, between);
            within += own[i];
        }
    }
    const Moments m = corrected(first, rest, between, share);
    return {m.mean, m.squares + within};
}

}  // namespace ncsn_fast

// Mean and sum of squares about it, of values and of sets of values.
//
// All are two-pass and corrected: sums are of differences from the first value, then of differences
// from the mean so found, and what those sum to mends it. Equal values give themselves and exactly 0.
#pragma once

#include "ncsn_fast/platform.h"

namespace ncsn_fast {

struct Moments {
    float mean, squares;
};

NCSN_HD Moments corrected(float mean, float rest, float squares, float share) {
    const float correction = rest * share;
    const float left = fused(-rest, correction, squares);
    return {mean + correction, left < 0.0f ? 0.0f : left};
}

// Of value(0) .. value(count - 1), 1 <= count <= n; share is 1 / count.
template <int n, class Value>
NCSN_HD Moments moments_of(int count, float share, Value value) {
    const float first = value(0);
    float sum = 0.0f, rest = 0.0f, squares = 0.0f;
    NCSN_UNROLL
    for (int i = 1; i < n; ++i) {
        if (i < count) sum += value(i) - first;
    }
    const float mean = fused(sum, share, first);
    NCSN_UNROLL
    for (int i = 0; i < n; ++i) {
        if (i < count) {
            const float d = value(i) - mean;
            rest += d;
            squares = fused(d, d, squares);
        }
    }
    return corrected(mean, rest, squares, share);
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

}  // namespace ncsn_fast

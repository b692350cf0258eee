// Transforms the weights of a Winograd convolution: G w G^T in float64, rounded once. Runs once per
// network.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace ncsn_fast {
namespace {

constexpr int kTaps = 3;

// Row p of G is (1, p, p^2) over the product of p - q for the other points q; that of infinity (0, 0, 1).
struct WeightTransform {
    double rows[kWinogradWindow][kTaps];

    WeightTransform() : rows{} {
        const double points[] = {0.0, kNear, -kNear, kFar, -kFar};
        for (int i = 0; i < kWinogradWindow - 1; ++i) {
            double product = 1.0;
            for (const double q : points) {
                if (q != points[i]) product *= points[i] - q;
            }
            for (int k = 0; k < kTaps; ++k) rows[i][k] = std::pow(points[i], k) / product;
        }
        rows[kWinogradWindow - 1][kTaps - 1] = 1.0;
    }

    // G w G^T at all points; w is 3x3.
    void apply(const float* w, double* out) const {
        for (int i = 0; i < kWinogradWindow; ++i) {
            for (int j = 0; j < kWinogradWindow; ++j) {
                double sum = 0.0;
                for (int k = 0; k < kTaps; ++k) {
                    for (int l = 0; l < kTaps; ++l) sum += rows[i][k] * rows[j][l] * w[k * kTaps + l];
                }
                out[i * kWinogradWindow + j] = sum;
            }
        }
    }
};

// The smallest scale with which integers fit into 16 bits, and a chunk's sum of products into 32.
float fixed_point_scale(const double* transformed, int64_t channels) {
    double largest = 0.0, largest_sum = 0.0;
    for (int64_t first = 0; first < channels; first += kWinogradChunk) {
        double sum = 0.0;
        for (int64_t c = first; c < std::min(first + kWinogradChunk, channels); ++c) {
            const double magnitude = std::abs(transformed[c * kWinogradPoints]);
            sum += magnitude;
            largest = std::max(largest, magnitude);
        }
        largest_sum = std::max(largest_sum, sum);
    }
    constexpr double kSumLimit = 2147483647.0 / kWinogradLevels - kWinogradChunk / 2.0;  // half: rounding
    constexpr double kSlack = 1.0 + 0x1p-20, kSmallest = 0x1p-120;  // slack: the scale is a float
    return static_cast<float>(
        std::max({largest_sum / kSumLimit, largest / 32767.0, kSmallest}) * kSlack);
}

}  // namespace

void winograd_pack(const float* weight, int64_t in_channels, int64_t out_channels, Dtype dtype,
                   void* values, float* scales) {
    static const WeightTransform transform;
    const WinogradSizes sizes(in_channels, out_channels);
    const bool fixed = dtype == Dtype::kBfloat16;
    const int64_t group = fixed ? 2 : 1;
    std::fill_n(static_cast<unsigned char*>(values), sizes.values * (fixed ? 2 : 4), 0);
    if (fixed) std::fill_n(scales, sizes.scales, 0.0f);
    std::vector<double> transformed(in_channels * kWinogradPoints);
    for (int64_t o = 0; o < out_channels; ++o) {
        const float* w = weight + o * in_channels * kTaps * kTaps;
        for (int64_t i = 0; i < in_channels * kTaps * kTaps; ++i) {
            if (!std::isfinite(w[i])) {
                throw std::invalid_argument("weights must be finite; got " + std::to_string(w[i]) +
                                            " for output channel " + std::to_string(o));
            }
        }
        for (int64_t c = 0; c < in_channels; ++c) {
            transform.apply(w + c * kTaps * kTaps, &transformed[c * kWinogradPoints]);
        }
        for (int64_t p = 0; p < kWinogradPoints; ++p) {
            const int64_t panel = o / kWinogradPanel * kWinogradPoints + p, lane = o % kWinogradPanel;
            const float scale = fixed ? fixed_point_scale(&transformed[p], in_channels) : 1.0f;
            if (fixed) scales[panel * kWinogradPanel + lane] = scale;
            for (int64_t c = 0; c < in_channels; ++c) {
                const double value = transformed[c * kWinogradPoints + p];
                const int64_t at =
                    (panel * sizes.channels + c / group * group) * kWinogradPanel + lane * group + c % group;
                if (fixed) {
                    static_cast<int16_t*>(values)[at] = static_cast<int16_t>(std::nearbyint(value / scale));
                } else {
                    static_cast<float*>(values)[at] = static_cast<float>(value);
                }
            }
        }
    }
}

}  // namespace ncsn_fast

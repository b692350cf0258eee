// Rounds the weights of a convolution in tiles to bfloat16 and orders them. Runs once per network.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace ncsn_fast {

void tile_pack(const float* weight, int64_t in_channels, int64_t out_channels, int64_t taps,
               Bfloat16* values) {
    constexpr int64_t kHalf = kTilePanel / 2;  // output channels of a tile
    const TileConvSizes sizes(in_channels, out_channels, taps);
    const int64_t chunks = sizes.channels / kTileChunk, window = taps * taps;
    std::fill_n(values, sizes.values, Bfloat16{0});
    for (int64_t o = 0; o < out_channels; ++o) {
        const int64_t panel = o / kTilePanel, half = o % kTilePanel / kHalf;
        for (int64_t c = 0; c < in_channels; ++c) {
            const int64_t chunk = c / kTileChunk, pair = c % kTileChunk / 2;
            for (int64_t tap = 0; tap < window; ++tap) {
                const float w = weight[(o * in_channels + c) * window + tap];
                if (!std::isfinite(w)) {
                    throw std::invalid_argument("weights must be finite; got " + std::to_string(w) +
                                                " for output channel " + std::to_string(o));
                }
                const int64_t tile = ((panel * chunks + chunk) * window + tap) * 2 + half;
                values[((tile * kTileChunk / 2 + pair) * kHalf + o % kHalf) * 2 + c % 2] = to_bfloat16(w);
            }
        }
    }
}

}  // namespace ncsn_fast

// Maps as kernels take them: the checked memory of dense ones, and of those with zeros around every image.
// Throws std::invalid_argument for sizes that do not fit.
#pragma once

#include <array>
#include <stdexcept>
#include <string>

#include "array.h"
#include "cpu/kernels.h"

namespace ncsn_fast {

using Map = std::array<int64_t, 4>;  // batch, height, width, channels

constexpr int64_t kDense = -1;  // the border of a dense map

inline Dtype dtype(bool bfloat16) { return bfloat16 ? Dtype::kBfloat16 : Dtype::kFloat32; }

inline int64_t checked_map(const Map& nhwc) {
    return checked_count({{"batch", nhwc[0]}, {"height", nhwc[1]}, {"width", nhwc[2]}, {"channels", nhwc[3]}});
}

inline PaddedMap checked_padded(const Map& nhwc, int64_t border) {
    constexpr int64_t kMost = 1 << 20;
    const auto [batch, height, width, channels] = nhwc;
    if (border < 0 || border > kMost) {
        throw std::invalid_argument("border must be in [0, 2**20]; got " + std::to_string(border));
    }
    checked_map(nhwc);
    // At least as many elements as there are.
    checked_count({{"batch", batch + 1}, {"height", height + 2 * border + 2}, {"width", width + 2 * border + kTileRun},
                   {"channels", channels + 2 * kTileChunk}});
    return PaddedMap(batch, height, width, channels, border);
}

// A map that is written: its first pixel, null if there is no such map, and where the others lie. A map without a
// border may be some channels of a wider one.
struct WrittenMap {
    void* first;
    PixelLayout pixels;
};

inline WrittenMap written_map(const char* name, const Array& memory, const Map& nhwc, int64_t border, Dtype type) {
    const auto [batch, height, width, channels] = nhwc;
    if (border == kDense) {
        checked_map(nhwc);
        if (memory.address == 0) return {nullptr, dense_pixels(height, width, channels)};
        const PixelRows rows = required_pixels(name, memory, batch * height * width, channels, type);
        return {rows.first, dense_pixels(height, width, rows.row)};
    }
    const PaddedMap map = checked_padded(nhwc, border);
    if (type != Dtype::kBfloat16) {
        throw std::invalid_argument(std::string(name) + " must be bfloat16, as it has a border; got float32");
    }
    return {required<Bfloat16>(name, memory, map.elements) + map.first, map.pixels};
}

inline WrittenMap required_map(const char* name, const Array& memory, const Map& nhwc, int64_t border, Dtype type) {
    if (border == kDense && memory.address == 0) required(name, memory, checked_map(nhwc), type);
    return written_map(name, memory, nhwc, border, type);
}

// The sizes of a norm's maps. `width` counts only where there are sums or a border.
inline Map norm_map(int64_t batch, int64_t channels, int64_t plane, bool channels_last, const Array& strip_sums,
                    int64_t width, int64_t border) {
    checked_count({{"batch", batch}, {"channels", channels}, {"plane", plane}});
    if (strip_sums.address == 0 && border == kDense) return {batch, 1, plane, channels};
    if (!channels_last || width < 1 || plane % width != 0) {
        throw std::invalid_argument("maps with strip_sums or a border must be channels-last, in rows of `width` "
                                    "pixels; got width " +
                                    std::to_string(width) + " for " + std::to_string(plane) + " pixels");
    }
    return {batch, plane / width, width, channels};
}

inline int64_t strip_sums_of(const Map& nhwc) {
    const Strips strips(nhwc[1], nhwc[2]);
    return kStripSums * checked_count({{"batch", nhwc[0]}, {"strips", strips.count}, {"channels", nhwc[3]}});
}

inline NormContext norm_context(const Map& nhwc, const Array& strip_sums, const PixelLayout& y_pixels) {
    return {optional<const float>("strip_sums", strip_sums, strip_sums_of(nhwc)),
            Strips(nhwc[1], nhwc[2]).rows * nhwc[2], y_pixels};
}

}  // namespace ncsn_fast

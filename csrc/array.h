// Memory as Python names it, and what is checked of it before a kernel is given an address.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "ncsn_fast/dtypes.h"

namespace ncsn_fast {

using Address = uintptr_t;

// A tensor's memory, from ncsn_fast.ops.addresses; {0, 0} where there is none.
struct Array {
    Address address = 0;
    int64_t bytes = 0;
    int64_t row = 0;  // elements from a pixel of a channels-last map to the next; 0 if it is its channels
};

struct Size {
    const char* name;
    int64_t value;
};

// Whatever is computed from sizes whose product is smaller, bytes and roundings included, fits in 64 bits.
constexpr int64_t kMostElements = int64_t{1} << 56;

// The product of sizes.
inline int64_t checked_count(std::initializer_list<Size> sizes) {
    bool fits = true, empty = false;
    int64_t product = 1;  // of those that are not 0: the others may be multiplied first
    for (const Size& size : sizes) {
        fits = fits && size.value >= 0 &&
               !__builtin_mul_overflow(product, std::max<int64_t>(size.value, 1), &product);
        empty = empty || size.value == 0;
    }
    if (fits && product < kMostElements) return empty ? 0 : product;
    std::string got;
    for (const Size& size : sizes) {
        got += (got.empty() ? "" : ", ") + std::string(size.name) + " " + std::to_string(size.value);
    }
    throw std::invalid_argument("sizes must not be negative, and their product must be below 2**56; got " +
                                got);
}

// The address of `count` elements of `size` bytes; without any it may be null.
inline void* checked_address(const char* name, const Array& array, int64_t count, int64_t size) {
    const auto [address, bytes, row] = array;
    if (row != 0) {
        throw std::invalid_argument(std::string(name) + " must have pixels without gaps between them; they begin " +
                                    std::to_string(row) + " elements apart");
    }
    if (count != 0) {
        const int64_t needed = count * size;
        if (address == 0) {
            throw std::invalid_argument(std::string(name) + " must have " + std::to_string(needed) +
                                        " bytes; there is none");
        }
        if (bytes < needed) {
            throw std::invalid_argument(std::string(name) + " must have " + std::to_string(needed) +
                                        " bytes; it has " + std::to_string(bytes));
        }
        if (address % static_cast<Address>(size) != 0 || address + static_cast<Address>(bytes) < address) {
            throw std::invalid_argument(std::string(name) + " must begin at a multiple of " +
                                        std::to_string(size) + " bytes; it begins at " +
                                        std::to_string(address));
        }
    }
    return reinterpret_cast<void*>(address);
}

template <class T>
T* required(const char* name, const Array& array, int64_t count) {
    return static_cast<T*>(checked_address(name, array, count, sizeof(T)));
}

// Null where there is no such tensor.
template <class T>
T* optional(const char* name, const Array& array, int64_t count) {
    return array.address == 0 ? nullptr : required<T>(name, array, count);
}

inline void* required(const char* name, const Array& array, int64_t count, Dtype dtype) {
    return checked_address(name, array, count, dtype == Dtype::kFloat32 ? 4 : 2);
}

inline void* optional(const char* name, const Array& array, int64_t count, Dtype dtype) {
    return array.address == 0 ? nullptr : required(name, array, count, dtype);
}

// A channels-last map whose pixels begin `row` elements apart.
struct PixelRows {
    void* first;
    int64_t row;
};

// A map that is written, perhaps as some channels of a wider one, whose others are left alone.
inline PixelRows required_pixels(const char* name, const Array& array, int64_t pixels, int64_t channels,
                                 Dtype dtype) {
    const int64_t row = array.row == 0 ? channels : array.row;
    if (row < channels) {
        throw std::invalid_argument(std::string(name) + " must have pixels of " + std::to_string(channels) +
                                    " elements; they begin " + std::to_string(row) + " apart");
    }
    const int64_t all = checked_count({{"pixels", pixels}, {"row", row}});
    const int64_t count = pixels == 0 || channels == 0 ? 0 : all - row + channels;
    return {required(name, {array.address, array.bytes}, count, dtype), row};
}

}  // namespace ncsn_fast

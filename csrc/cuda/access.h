// Neighbouring elements of a map read and written as whole words: 16 bytes at a time on a GPU.
#pragma once

#include <string.h>

#include "ncsn_fast/dtypes.h"

namespace ncsn_fast {

// n 32-bit words; `from` and `to` are aligned to 16 bytes, or to 8 for two words.
template <int n>
NCSN_HD void load_words(const void* from, uint32_t* out) {
    static_assert(n == 2 || n % 4 == 0);
#if defined(__CUDA_ARCH__)
    if constexpr (n == 2) {
        const uint2 v = *static_cast<const uint2*>(from);
        out[0] = v.x, out[1] = v.y;
    } else {
        NCSN_UNROLL
        for (int i = 0; i < n; i += 4) {
            const uint4 v = static_cast<const uint4*>(from)[i / 4];
            out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
        }
    }
#else
    memcpy(out, from, n * sizeof(uint32_t));
#endif
}

template <int n>
NCSN_HD void store_words(void* to, const uint32_t* words) {
    static_assert(n == 2 || n % 4 == 0);
#if defined(__CUDA_ARCH__)
    if constexpr (n == 2) {
        *static_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else {
        NCSN_UNROLL
        for (int i = 0; i < n; i += 4) {
            static_cast<uint4*>(to)[i / 4] =
                make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
        }
    }
#else
    memcpy(to, words, n * sizeof(uint32_t));
#endif
}

// n elements of type T at once. The Dtype of its functions is T's, for the sake of AnyAccess.
template <class T, int n>
struct Access {
    static constexpr int kWidth = n;
    static constexpr bool kNarrow = sizeof(T) < sizeof(float);
    static constexpr int kWords = n * static_cast<int>(sizeof(T)) / 4;

    struct Raw {
        uint32_t word[kWords];
    };

    NCSN_HD Raw load(Dtype, const void* base, int64_t i) {
        Raw raw;
        load_words<kWords>(static_cast<const T*>(base) + i, raw.word);
        return raw;
    }

    NCSN_HD float value(const Raw& raw, int i) {
        if constexpr (sizeof(T) == sizeof(float)) {
            return bits_float(raw.word[i]);
        } else {
            return to_float(T{static_cast<uint16_t>(raw.word[i / 2] >> (i % 2 * 16))});
        }
    }

    NCSN_HD void store(Dtype, void* base, int64_t i, const float* values) {
        Raw raw;
        NCSN_UNROLL
        for (int k = 0; k < kWords; ++k) {
            if constexpr (sizeof(T) == sizeof(float)) {
                raw.word[k] = float_bits(values[k]);
            } else {
                raw.word[k] = pair_bits(T{}, values[2 * k], values[2 * k + 1]);
            }
        }
        store_words<kWords>(static_cast<T*>(base) + i, raw.word);
    }
};

// One element, of a type known at run time: for maps whose pixels are no whole number of 16 bytes.
struct AnyAccess {
    static constexpr int kWidth = 1;
    static constexpr bool kNarrow = false;  // not for certain

    struct Raw {
        float value;
    };

    NCSN_HD Raw load(Dtype dtype, const void* base, int64_t i) { return {load_as(dtype, base, i)}; }

    NCSN_HD float value(const Raw& raw, int) { return raw.value; }

    NCSN_HD void store(Dtype dtype, void* base, int64_t i, const float* values) {
        store_as(dtype, base, i, values[0]);
    }
};

}  // namespace ncsn_fast

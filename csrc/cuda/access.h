// Neighbouring elements of a map read and written as whole words: 16 bytes at a time on a GPU.
#pragma once

#include <string.h>

#include "ncsn_fast/dtypes.h"

namespace ncsn_fast {

#if defined(__CUDA_ARCH__)

// In assembly, because the compiler splits a 16-byte store if part of the value is a known constant.
__device__ __forceinline__ void load_16(const void* from, uint32_t* out) {
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "l"(__cvta_generic_to_global(from)));
}

__device__ __forceinline__ void load_8(const void* from, uint32_t* out) {
    asm volatile("ld.global.v2.b32 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "l"(__cvta_generic_to_global(from)));
}

__device__ __forceinline__ uint32_t load_4(const void* from) {
    uint32_t out;
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(out) : "l"(__cvta_generic_to_global(from)));
    return out;
}

__device__ __forceinline__ void store_16(void* to, const uint32_t* words) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}

// Like store_16, with the evict-first cache policy.
__device__ __forceinline__ void store_16_last(void* to, const uint32_t* words) {
    asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}

__device__ __forceinline__ void store_8(void* to, const uint32_t* words) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(words[0]),
                 "r"(words[1])
                 : "memory");
}

#endif

// n 32-bit words; `from` and `to` are aligned to 16 bytes, or to 4 n if n is less than 4. The compiler
// leaves these loads in their order and above a branch that follows: what is loaded in a row is awaited
// once.
template <int n>
NCSN_HD void load_words(const void* from, uint32_t* out) {
    static_assert(n == 1 || n == 2 || n % 4 == 0);
#if defined(__CUDA_ARCH__)
    if constexpr (n == 1) out[0] = load_4(from);
    if constexpr (n == 2) load_8(from, out);
    NCSN_UNROLL
    for (int i = 0; i + 4 <= n; i += 4) load_16(static_cast<const uint32_t*>(from) + i, out + i);
#else
    memcpy(out, from, n * sizeof(uint32_t));
#endif
}

NCSN_HD uint32_t load_word(const void* from) {
    uint32_t word;
    load_words<1>(from, &word);
    return word;
}

// last: not read again soon, so it may be evicted first.
template <int n, bool last>
NCSN_HD void store_words(void* to, const uint32_t* words) {
    static_assert(n == 2 || n % 4 == 0);
#if defined(__CUDA_ARCH__)
    if constexpr (n == 2) store_8(to, words);
    NCSN_UNROLL
    for (int i = 0; i + 4 <= n; i += 4) {
        if constexpr (last) {
            store_16_last(static_cast<uint32_t*>(to) + i, words + i);
        } else {
            store_16(static_cast<uint32_t*>(to) + i, words + i);
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

    template <bool last = false>
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
        store_words<kWords, last>(static_cast<T*>(base) + i, raw.word);
    }
};

// One element of a dtype known at run time, for maps whose pixels are not a multiple of 16 bytes.
struct AnyAccess {
    static constexpr int kWidth = 1;
    static constexpr bool kNarrow = false;  // not for certain

    struct Raw {
        float value;
    };

    NCSN_HD Raw load(Dtype dtype, const void* base, int64_t i) { return {load_as(dtype, base, i)}; }

    NCSN_HD float value(const Raw& raw, int) { return raw.value; }

    template <bool last = false>
    NCSN_HD void store(Dtype dtype, void* base, int64_t i, const float* values) {
        store_as(dtype, base, i, values[0]);
    }
};

}  // namespace ncsn_fast

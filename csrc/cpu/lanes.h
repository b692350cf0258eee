// Vectors of any power of two of lanes, so that one template covers a whole register, the last few
// channels of a map and a single channel.
#pragma once

#include "level.h"

// Permutations of 16-bit lanes are single instructions of AVX-512, little-endian.
#if defined(__AVX512BW__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define NCSN_SHUFFLES 1
#endif
#endif

namespace ncsn_fast::NCSN_ISA {

template <class T, int n>
struct VectorOf {
    typedef T Type __attribute__((vector_size(n * sizeof(T))));
};

template <class T, int n>
using Lanes = typename VectorOf<T, n>::Type;

template <class V, class T>
static inline V load_bits(const T* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

template <class V, class T>
static inline void store_bits(T* p, V v) {
    memcpy(p, &v, sizeof v);
}

template <int n>
static inline Lanes<float, n> load_lanes(const float* p) {
    return load_bits<Lanes<float, n>>(p);
}

template <int n>
static inline Lanes<float, n> load_lanes(const Bfloat16* p) {
    const auto bits = load_bits<Lanes<uint16_t, n>>(p);
#if NCSN_SHUFFLES
    if constexpr (n == 16) {  // one instruction, where GCC converts in four
        return (Lanes<float, n>)__builtin_shufflevector(
            Lanes<uint16_t, n>{}, bits, 0, 16, 0, 17, 0, 18, 0, 19, 0, 20, 0, 21, 0, 22, 0, 23, 0, 24, 0,
            25, 0, 26, 0, 27, 0, 28, 0, 29, 0, 30, 0, 31);
    }
#endif
    return (Lanes<float, n>)(__builtin_convertvector(bits, Lanes<uint32_t, n>) << 16);
}

template <int n>
static inline void store_lanes(float* p, Lanes<float, n> v) {
    store_bits(p, v);
}

// As to_bfloat16.
template <int n>
static inline void store_lanes(Bfloat16* p, Lanes<float, n> v) {
    using Wide = Lanes<uint32_t, n>;
    const Wide u = (Wide)v, rounded = u + 0x7fffu + ((u >> 16) & 1u);
    const Wide kept = v == v ? rounded : Wide{} + 0x7fc00000u;
#if NCSN_SHUFFLES
    if constexpr (n == 16) {
        const auto halves = (Lanes<uint16_t, 2 * n>)kept;
        store_bits(p, __builtin_shufflevector(halves, halves, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23,
                                              25, 27, 29, 31));
        return;
    }
#endif
    store_bits(p, __builtin_convertvector(kept >> 16, Lanes<uint16_t, n>));
}

// f of each lane; loops over all lanes become vector instructions, and `lane` stays in a register. All of
// f must be inlined for that: its call has the attribute, too.
template <int n, class F>
static inline __attribute__((always_inline)) Lanes<float, n> each_lane(Lanes<float, n> v, F f) {
    float lane[n];
    memcpy(lane, &v, sizeof v);
#pragma omp simd
    for (int i = 0; i < n; ++i) lane[i] = f(lane[i]);
    memcpy(&v, lane, sizeof v);
    return v;
}

constexpr int kSumLanes = 32;  // lanes of a sum whose order is fixed, at every instruction-set level

// A sum in kSumLanes lanes of T, added up in a fixed tree.
template <class T>
static inline T total(T (&lane)[kSumLanes]) {
    for (int half = kSumLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    }
    return lane[0];
}

static inline int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

// Copies `count` pixels of some bytes, which begin other numbers of bytes apart.
static inline void copy_strided(const unsigned char* from, unsigned char* to, int64_t count, int64_t bytes,
                               int64_t from_apart, int64_t to_apart) {
    if (from_apart == bytes && to_apart == bytes) {
        memcpy(to, from, static_cast<size_t>(count * bytes));
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        memcpy(to + i * to_apart, from + i * from_apart, static_cast<size_t>(bytes));
    }
}

template <int n>
struct Width {};

// The last count - i < 2 n elements: one vector of n, n / 2, ... 1 where it fits.
template <int n, class Run>
static inline void for_each_tail(int64_t i, int64_t count, Run run) {
    if (i + n <= count) {
        run(i, Width<n>{});
        i += n;
    }
    if constexpr (n > 1) for_each_tail<n / 2>(i, count, run);
}

// Calls run(i, Width<n>{}) for vectors of n elements from i that together make `count`.
template <class Run>
static inline void for_each_vector(int64_t count, Run run) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) run(i, Width<kLanes>{});
    for_each_tail<kLanes / 2>(i, count, run);
}

// As for_each_vector, with run(i, Width<n>{}, Width<k>{}) for k vectors of n at once: 4 or 1.
template <class Run>
static inline void for_each_block(int64_t count, Run run) {
    constexpr int kVectors = 4;
    int64_t i = 0;
    for (; i + kVectors * kLanes <= count; i += kVectors * kLanes) {
        run(i, Width<kLanes>{}, Width<kVectors>{});
    }
    for_each_vector(count - i, [=]<int n>(int64_t j, Width<n> width) { run(i + j, width, Width<1>{}); });
}

}  // namespace ncsn_fast::NCSN_ISA

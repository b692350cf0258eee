// Vectors of any power of two of lanes, so that one template covers a whole register, the last few
// channels of a map and a single channel.
#pragma once

#include "level.h"

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

template <int n>
static inline Lanes<float, n> load_lanes(const float* p) {
    return load_bits<Lanes<float, n>>(p);
}

template <int n>
static inline Lanes<float, n> load_lanes(const Bfloat16* p) {
    const auto bits = load_bits<Lanes<uint16_t, n>>(p);
    return (Lanes<float, n>)(__builtin_convertvector(bits, Lanes<uint32_t, n>) << 16);
}

template <int n>
static inline void store_lanes(float* p, Lanes<float, n> v) {
    memcpy(p, &v, sizeof v);
}

// As to_bfloat16.
template <int n>
static inline void store_lanes(Bfloat16* p, Lanes<float, n> v) {
    using Wide = Lanes<uint32_t, n>;
    const Wide u = (Wide)v, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const Wide kept = v == v ? rounded : Wide{} + 0x7fc0u;
    const auto bits = __builtin_convertvector(kept, Lanes<uint16_t, n>);
    memcpy(p, &bits, sizeof bits);
}

}  // namespace ncsn_fast::NCSN_ISA

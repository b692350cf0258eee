// What the files of one instruction-set level share. NCSN_ISA names the level's namespace.
#pragma once

#include <string.h>

#include "kernels.h"

#if defined(__AVX512F__)
#define NCSN_LANES 16
#elif defined(__AVX__)
#define NCSN_LANES 8
#else
#define NCSN_LANES 4
#endif

namespace ncsn_fast::NCSN_ISA {

void noise(NoiseKind kind, const NoiseArgs& args, int threads);
void box_muller_pairs(const uint32_t* words, int64_t pairs, float* out);
void instance_norm_plus(const NormArgs& args, const NormPlan& plan, const NormWorkspace& workspace);
void sampler_update(const UpdateArgs& args, int threads);

// A vector register of floats; operators work lane by lane.
constexpr int kLanes = NCSN_LANES;
typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(kLanes * 2)));

template <class V>
static inline V load(const float* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
static inline V load(const Bfloat16* p) {
    if constexpr (sizeof(V) == sizeof(float)) {
        return to_float(*p);
    } else {
        VecHalf half;
        memcpy(&half, p, sizeof half);
        return (V)(__builtin_convertvector(half, VecBits) << 16);
    }
}

template <class V>
static inline void store_vector(float* p, V v) {
    memcpy(p, &v, sizeof v);
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace ncsn_fast::NCSN_ISA

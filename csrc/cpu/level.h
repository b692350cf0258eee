// Vector types shared by the files of one instruction-set level; NCSN_ISA is the level's namespace.
#pragma once

#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

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
void instance_norm_plus(const NormArgs& args, const NormContext& context, const NormPlan& plan,
                        const NormWorkspace& workspace);
void sampler_update(const UpdateArgs& args, int threads);
void group_norm(const GroupNormArgs& args, const NormContext& context, const NormPlan& plan,
                const NormWorkspace& workspace);
void scale_shift(const ScaleShiftArgs& args, const NormPlan& plan, const NormWorkspace& workspace);
void moments(const MomentsArgs& args, const NormPlan& plan, const NormWorkspace& workspace);
void norm_gradient(const NormGradientArgs& args, int threads);
void add_activation(const AddActivationArgs& args, int threads);
void copy_channels(const CopyChannelsArgs& args, int threads);
void upsample_nearest(const UpsampleArgs& args, int threads);
void depth_to_space(const DepthToSpaceArgs& args, int threads);
void depthwise_transposed(const DepthwiseTransposedArgs& args, int threads);
void attention(const AttentionArgs& args, const AttentionPlan& plan, const AttentionWorkspace& workspace);
void softmax(const SoftmaxArgs& args, const SoftmaxWorkspace& workspace);
void pool5(PoolKind kind, const PoolArgs& args, int threads);
void mean_pool2(const MeanPoolArgs& args, int threads);
void resize_add(const ResizeArgs& args, int threads);
void winograd(const WinogradArgs& args, const WinogradPlan& plan, const WinogradWorkspace& workspace);

// A vector register of floats; operators work lane by lane.
constexpr int kLanes = NCSN_LANES;
typedef float Vec __attribute__((vector_size(kLanes * 4)));

// A register of doubles, and the floats that widen to it.
typedef double VecDouble __attribute__((vector_size(kLanes * 4)));
typedef float VecHalf __attribute__((vector_size(kLanes * 2)));

// The bits of bfloat16s, narrow as in memory and widened to those of a vector of floats V.
template <class V>
struct BitsOf;

template <>
struct BitsOf<Vec> {
    typedef uint16_t Narrow __attribute__((vector_size(kLanes * 2)));
    typedef uint32_t Wide __attribute__((vector_size(kLanes * 4)));
};

template <>
struct BitsOf<VecHalf> {
    typedef uint16_t Narrow __attribute__((vector_size(kLanes)));
    typedef uint32_t Wide __attribute__((vector_size(kLanes * 2)));
};

// For a vector of floats V: its number of lanes, and the vector of doubles that half of them (a single
// float: all) widens to.
template <class V>
struct Widening {
    static constexpr int kParts = 2, kLanesOfPart = kLanes / 2;
    using Part = VecHalf;
    using Double = VecDouble;
};

template <>
struct Widening<float> {
    static constexpr int kParts = 1, kLanesOfPart = 1;
    using Part = float;
    using Double = double;
};

static inline VecDouble widen(VecHalf v) { return __builtin_convertvector(v, VecDouble); }

static inline double widen(float v) { return v; }

static inline Vec narrow(const VecDouble* v) {
    VecHalf half[2] = {__builtin_convertvector(v[0], VecHalf), __builtin_convertvector(v[1], VecHalf)};
    Vec out;
    memcpy(&out, half, sizeof out);
    return out;
}

static inline float narrow(const double* v) { return static_cast<float>(*v); }

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
        typename BitsOf<V>::Narrow bits;
        memcpy(&bits, p, sizeof bits);
        return (V)(__builtin_convertvector(bits, typename BitsOf<V>::Wide) << 16);
    }
}

template <class T, class V>
static inline void store_vector(T* p, V v) {
    memcpy(p, &v, sizeof v);
}

// a b + c, with one rounding.
static inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    for (int i = 0; i < kLanes; ++i) c[i] = fused(a[i], b[i], c[i]);
    return c;
#endif
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace ncsn_fast::NCSN_ISA

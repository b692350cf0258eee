// Compiler abstraction for the other headers, which are plain C++ to a host compiler and host+device
// functions to nvcc.
//
// Functions have internal linkage on purpose. Each instruction-set level of the CPU kernels includes
// these headers with its own compiler flags; a shared inline symbol would let the linker keep only one.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define NCSN_HD static __host__ __device__ __forceinline__
#define NCSN_HD_MEMBER __host__ __device__ __forceinline__
#define NCSN_UNROLL _Pragma("unroll")
#define NCSN_NO_UNROLL _Pragma("unroll 1")
#else
#define NCSN_HD static inline __attribute__((always_inline))
#define NCSN_HD_MEMBER inline __attribute__((always_inline))
#define NCSN_UNROLL _Pragma("GCC unroll 16")
#define NCSN_NO_UNROLL _Pragma("GCC unroll 1")
#endif

namespace ncsn_fast {

// a * b + c with one rounding. Contraction is off everywhere, so this is the only source of fused
// multiply-adds, and every instruction set computes the same bits.
NCSN_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
}

NCSN_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(x);
#else
    return __builtin_sqrtf(x);
#endif
}

NCSN_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(x);
#else
    return __builtin_bit_cast(uint32_t, x);
#endif
}

NCSN_HD float bits_float(uint32_t x) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(x);
#else
    return __builtin_bit_cast(float, x);
#endif
}

}  // namespace ncsn_fast

// Where compilers differ: g++ from 11 on, clang from 14 on, and nvcc.
#pragma once

#if defined(__CUDACC__)
#define S0_CALL __device__ __forceinline__
#else
#define S0_CALL inline __attribute__((always_inline))
#endif

// In front of a loop that nvcc shall unroll, and others may.
#if defined(__CUDACC__)
#define S0_UNROLL _Pragma("unroll")
#else
#define S0_UNROLL
#endif

// In front of a loop whose bounds are constants once everything is inlined.
#if defined(__clang__)
#define S0_UNROLL_WHOLE _Pragma("clang loop unroll(full)")
#else
#define S0_UNROLL_WHOLE _Pragma("GCC unroll 16")
#endif

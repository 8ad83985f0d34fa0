// Differences between compilers: g++ 11 and newer, clang 14 and newer, and nvcc.
#pragma once

#if defined(__CUDACC__)
#define S0_CALL __device__ __forceinline__
#else
#define S0_CALL inline __attribute__((always_inline))
#endif

// Put before a loop that nvcc must unroll and that other compilers may unroll.
#if defined(__CUDACC__)
#define S0_UNROLL _Pragma("unroll")
#else
#define S0_UNROLL
#endif

// Put before a loop whose bounds are constants after inlining.
#if defined(__clang__)
#define S0_UNROLL_WHOLE _Pragma("clang loop unroll(full)")
#else
#define S0_UNROLL_WHOLE _Pragma("GCC unroll 16")
#endif

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define S0_ISA avx512
#define S0_VECTOR_BYTES 64
#define S0_BLOCK_VECTORS 4
#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/step.h"
#include "cpu/token.h"
#endif

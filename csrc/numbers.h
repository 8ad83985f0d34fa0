// Conversion of 16-bit numbers to float, which is exact, and back, which rounds to nearest, ties to even.
// Bits is uint32_t and Float is float, or both are vectors with the same number of lanes. No step depends on a
// subnormal float, so the result is the same on a machine that flushes subnormals to zero.
#pragma once

#include <cstdint>

#include "compiler.h"
#include "kind.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#elif defined(__F16C__)
#include <immintrin.h>
#endif

namespace s0::S0_ISA {

template <class Float, class Bits>
S0_CALL Float widen_bfloat16(Bits x) {
  return __builtin_bit_cast(Float, x << 16);
}

template <class Bits, class Float>
S0_CALL Bits narrow_bfloat16(Float x) {
  const Bits bits = __builtin_bit_cast(Bits, x);
  return x != x ? Bits{} + 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

template <class Float, class Bits>
S0_CALL Float widen_half(Bits x) {
  constexpr uint32_t one = 1u << 23, smallest = 113 * one;  // one step of the exponent; 2^-14, the smallest normal number
  const Bits number = (x & 0x7fffu) << 13;
  const Float subnormal =
      __builtin_bit_cast(Float, number + smallest) - __builtin_bit_cast(Float, Bits{} + smallest);
  const Bits finite = number < one ? __builtin_bit_cast(Bits, subnormal) : number + 112 * one;
  const Bits result = number >= 31 * one ? number + 224 * one : finite;
  return __builtin_bit_cast(Float, result | (x & 0x8000u) << 16);
}

template <class Bits, class Float>
S0_CALL Bits narrow_half(Float x) {
  constexpr uint32_t one = 1u << 23, half = 126 * one;  // one step of the exponent; 0.5, whose last bit is worth 2^-24
  const Bits all = __builtin_bit_cast(Bits, x), sign = all & 0x80000000u, bits = all ^ sign;
  const Bits infinite = bits > 255 * one ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
  const Float sum = __builtin_bit_cast(Float, bits) + __builtin_bit_cast(Float, Bits{} + half);
  const Bits subnormal = __builtin_bit_cast(Bits, sum) - half;
  const Bits normal = (bits - 112 * one + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  const Bits finite = bits < 113 * one ? subnormal : normal;
  return (bits >= 143 * one ? infinite : finite) | sign >> 16;
}

S0_CALL float to_float(float x) { return x; }
S0_CALL double to_float(double x) { return x; }
S0_CALL float to_float(BFloat16 x) { return widen_bfloat16<float>(uint32_t{x.bits}); }

S0_CALL void assign(float& to, float x) { to = x; }
S0_CALL void assign(double& to, double x) { to = x; }
S0_CALL void assign(BFloat16& to, float x) { to.bits = static_cast<uint16_t>(narrow_bfloat16<uint32_t>(x)); }

#if defined(__CUDACC__)
S0_CALL float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
S0_CALL void assign(Half& to, float x) { to.bits = __half_as_ushort(__float2half_rn(x)); }
#elif defined(__F16C__)
S0_CALL float to_float(Half x) { return _cvtsh_ss(x.bits); }
S0_CALL void assign(Half& to, float x) { to.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
S0_CALL float to_float(Half x) { return widen_half<float>(uint32_t{x.bits}); }
S0_CALL void assign(Half& to, float x) { to.bits = static_cast<uint16_t>(narrow_half<uint32_t>(x)); }
#endif

}  // namespace s0::S0_ISA

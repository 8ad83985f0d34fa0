// The element types of tensors.
#pragma once

#include <cstdint>

namespace s0 {

enum class Kind : int { kFloat, kDouble, kHalf, kBFloat16 };

// The bits of the two 16-bit types, because not every compiler supports these types and their conversion. See
// numbers.h.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace s0

// The element types of tensors.
#pragma once

#include <cstdint>

namespace s0 {

enum class Kind : int { kFloat, kDouble, kHalf, kBFloat16 };

// Two of them as they lie in memory: not every compiler knows them, nor converts them without help. See numbers.h.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace s0

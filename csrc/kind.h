// The element types of tensors.
#pragma once

namespace s0 {

enum class Kind : int { kFloat, kDouble, kHalf, kBFloat16 };

}  // namespace s0

// Checks of the tensors that operators get, on LibTorch's stable ABI.
// s0kernels/ops has validated them already; these checks are the minimum for memory safety.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "kind.h"

namespace s0 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// The device whose memory the kernels of a library read.
enum class Device { kCpu, kCuda };

inline void check_device(const Tensor& x, Device device) {
  STD_TORCH_CHECK(device == Device::kCuda ? x.is_cuda() : x.is_cpu(), "s0kernels: a tensor on another device");
}

// Arithmetic in fp64 reads and writes fp64 only; arithmetic in fp32 reads and writes the other three dtypes.
inline Kind kind_of(const Tensor& x, ScalarType arithmetic) {
  STD_TORCH_CHECK((x.scalar_type() == ScalarType::Double) == (arithmetic == ScalarType::Double),
                  "s0kernels: tensors of fp64 and of other dtypes do not mix");
  switch (x.scalar_type()) {
    case ScalarType::Float: return Kind::kFloat;
    case ScalarType::Double: return Kind::kDouble;
    case ScalarType::Half: return Kind::kHalf;
    case ScalarType::BFloat16: return Kind::kBFloat16;
    default: STD_TORCH_CHECK(false, "s0kernels: unsupported dtype");
  }
}

inline void* output_data(const Tensor& x, Device device) {
  check_device(x, device);
  STD_TORCH_CHECK(x.is_contiguous(), "s0kernels: a contiguous output expected");
  return x.mutable_data_ptr();
}

}  // namespace s0

// The CUDA kernels as torch operators. Compiled without CUDA's headers, for one library with kernels.cu.
#include "cuda/kernels.h"
#include "cuda/plan.h"
#include "token/operators.h"

// in libtorch_cuda; torch's headers declare it only in builds for CUDA
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <string>

namespace s0::steps {
namespace {

template <class Call>
void run(Call& call, const Tensor& output) {
  plan(call);
  const int32_t device = output.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "s0kernels: no CUDA stream");
  Optional own;  // may be freed after the call: the allocator keeps the memory for this stream or graph
  if (const int64_t count = counters(call); count > 0) {
    call.arrivals = gpu::workspace(stream, count);
    if (call.arrivals == nullptr) {
      own = torch::stable::new_zeros(output, std::array{count}, ScalarType::Int);
      call.arrivals = static_cast<unsigned*>(own->mutable_data_ptr());
    }
  }
  const char* problem = gpu::launch(call, stream);
  STD_TORCH_CHECK(problem == nullptr, "s0kernels: the launch failed: ", problem);
}

// Returns the reason why a device cannot run the kernels, or "".
std::string unusable(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  const char* problem = gpu::unusable();
  return problem == nullptr ? "" : problem;
}

}  // namespace
}  // namespace s0::steps

STABLE_TORCH_LIBRARY(s0kernels_cuda, m) {
  m.def(S0_GATED_DELTA_RULE_STEP);
  m.def(S0_SSD_STEP);
  m.def("unusable(int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(s0kernels_cuda, CompositeExplicitAutograd, m) {
  using namespace s0;
  m.impl("gated_delta_rule_step", TORCH_BOX((&steps::gated_delta_rule_step<Device::kCuda, steps::run<Delta>>)));
  m.impl("ssd_step", TORCH_BOX((&steps::ssd_step<Device::kCuda, steps::run<Ssd>>)));
  m.impl("unusable", TORCH_BOX(&steps::unusable));
}

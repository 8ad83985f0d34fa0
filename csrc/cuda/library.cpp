// The CUDA kernels as torch operators. Compiled without CUDA's headers, for one library with kernels.cu.
#include "cuda/operators.h"

#include "cuda/kernels.h"

// in libtorch_cuda; declared by torch's headers only where they were made for CUDA
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

#include <torch/csrc/stable/accelerator.h>

namespace s0::steps {
namespace {

template <class Call>
void run(Call& call, const Site& site, const Tensor& on, const Optional& tickets, int64_t emulated) {
  STD_TORCH_CHECK(emulated == 0, "s0kernels: emulated blocks are for a CPU");
  plan(call);
  hand_out(call, site, tickets);
  const int32_t device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "s0kernels: no CUDA stream");
  const char* problem = gpu::launch(call, stream);
  STD_TORCH_CHECK(problem == nullptr, "s0kernels: the launch failed: ", problem);
}

// Why a device cannot run the kernels, or nothing.
std::string unusable(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  const char* problem = gpu::unusable();
  return problem == nullptr ? "" : problem;
}

}  // namespace
}  // namespace s0::steps

STABLE_TORCH_LIBRARY(s0kernels_cuda, m) {
  m.def(S0_DELTA_STEP);
  m.def(S0_SSD_STEP);
  m.def("unusable(int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(s0kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("delta_step", TORCH_BOX((&s0::steps::delta_step<s0::steps::run<s0::Delta>, true>)));
  m.impl("ssd_step", TORCH_BOX((&s0::steps::ssd_step<s0::steps::run<s0::Ssd>, true>)));
  m.impl("unusable", TORCH_BOX(&s0::steps::unusable));
}

// The kernels and their launches. They need CUDA alone.
#define S0_ISA gpu
#include "cuda/kernels.h"

#include <cuda_runtime.h>

#include "cuda/block.h"
#include "cuda/workspace.h"
#include "token/gated_delta_rule.h"
#include "token/ssd.h"

namespace s0::gpu {

constexpr int kThreads = 32 * kMaxWarps;

// Unmangled names make the compiler's report readable.
extern "C" {

__global__ void __launch_bounds__(kThreads, 2) s0_gated_delta_rule_step(const __grid_constant__ Delta d) {
  __shared__ DeltaShared shared;
  GpuBlock block;
  delta_block<true>(block, shared, d, blockIdx.x);
}

__global__ void __launch_bounds__(kThreads, 1) s0_gated_delta_rule_step_strided(const __grid_constant__ Delta d) {
  __shared__ DeltaShared shared;
  GpuBlock block;
  delta_block<false>(block, shared, d, blockIdx.x);
}

__global__ void __launch_bounds__(kThreads, 2) s0_ssd_step(const __grid_constant__ Ssd s) {
  __shared__ SsdShared shared;
  GpuBlock block;
  ssd_block<true>(block, shared, s, blockIdx.x);
}

__global__ void __launch_bounds__(kThreads, 1) s0_ssd_step_strided(const __grid_constant__ Ssd s) {
  __shared__ SsdShared shared;
  GpuBlock block;
  ssd_block<false>(block, shared, s, blockIdx.x);
}

}  // extern "C"

namespace {

template <class Call>
const char* launch_one(void (*kernel)(Call), const Call& call, void* stream) {
  if (blocks(call) == 0) return nullptr;
  if (blocks(call) > 0x7fffffff) return "more heads than one launch can have";
  kernel<<<static_cast<unsigned>(blocks(call)), 32 * call.warps, 0, static_cast<cudaStream_t>(stream)>>>(call);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

unsigned* workspace(void* stream, int64_t count) {
  static auto& all = *new Workspaces;  // never destroyed: CUDA may have shut down before static destructors run
  return all.of(static_cast<cudaStream_t>(stream), count);
}

const char* launch(const Delta& d, void* stream) {
  return launch_one(d.fast ? s0_gated_delta_rule_step : s0_gated_delta_rule_step_strided, d, stream);
}

const char* launch(const Ssd& s, void* stream) {
  return launch_one(s.fast ? s0_ssd_step : s0_ssd_step_strided, s, stream);
}

const char* unusable() {
  cudaFuncAttributes found;
  const cudaError_t error = cudaFuncGetAttributes(&found, s0_gated_delta_rule_step);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clears the error for later callers
  return cudaGetErrorString(error);
}

}  // namespace s0::gpu

// Memory for arrival counters, which are zero before and after every kernel.
// Kernels that run in order can share a workspace, because each resets its counters to zero. Kernels that may run at
// the same time cannot, so each stream has its own. A stream is identified by its id, which CUDA never reuses: a handle
// may be reused for another stream while kernels of the first still run. Memory that has become too small is not freed,
// because running kernels may use it. Sizes double, so the unused memory is less than the memory in use.
// A captured call gets no workspace from here: its graph may be replayed on any stream, at the same time as other
// graphs captured on this one. It uses memory of the graph, which the graph zeroes in every replay.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace s0::gpu {

class Workspaces {
 public:
  static constexpr int64_t kLeast = 1024;     // counters
  static constexpr std::size_t kMost = 1024;  // streams: torch creates a few dozen; other code may create any number

  // Returns at least `count` counters for the next kernel on `stream` of the current device. Null if the call must
  // bring its own: it is being captured, there is no memory, or there are too many streams.
  unsigned* of(cudaStream_t stream, int64_t count) {
    unsigned* found = look(stream, count);
    if (found == nullptr) cudaGetLastError();  // clears the error for later callers
    return found;
  }

 private:
  struct Workspace {
    unsigned* counters = nullptr;
    int64_t size = 0;
  };

  unsigned* look(cudaStream_t stream, int64_t count) {
    cudaStreamCaptureStatus status;
    unsigned long long id;
    int device;
    if (cudaStreamIsCapturing(stream, &status) != cudaSuccess || status != cudaStreamCaptureStatusNone) return nullptr;
    if (cudaStreamGetId(stream, &id) != cudaSuccess || cudaGetDevice(&device) != cudaSuccess) return nullptr;
    const std::lock_guard lock(mutex_);
    const auto known = by_stream_.find({device, id});
    if (known == by_stream_.end() && by_stream_.size() == kMost) return nullptr;
    Workspace mine = known == by_stream_.end() ? Workspace{} : known->second;
    if (mine.size < count) {
      mine.size = std::max({count, 2 * mine.size, kLeast});
      mine.counters = zeros(stream, mine.size);
      if (mine.counters == nullptr) return nullptr;
      by_stream_[{device, id}] = mine;
    }
    return mine.counters;
  }

  // Zeroed on the stream itself, so before the next kernel.
  static unsigned* zeros(cudaStream_t stream, int64_t size) {
    void* memory = nullptr;
    const std::size_t bytes = static_cast<std::size_t>(size) * sizeof(unsigned);
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // allowed while another thread captures a graph
    if (cudaThreadExchangeStreamCaptureMode(&mode) != cudaSuccess) return nullptr;
    if (cudaMalloc(&memory, bytes) != cudaSuccess) memory = nullptr;
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (memory != nullptr && cudaMemsetAsync(memory, 0, bytes, stream) != cudaSuccess) return nullptr;
    return static_cast<unsigned*>(memory);
  }

  std::mutex mutex_;
  std::map<std::pair<int, unsigned long long>, Workspace> by_stream_;
};

}  // namespace s0::gpu

// Where arrival counters lie: zero before every kernel, zero after it.
//
// Kernels that run in order can share a workspace, since each returns its counters to zero. Kernels that may run at
// once cannot. So there is one for each stream. A stream goes by the id that CUDA never gives twice: a handle may come
// back for another stream while kernels of the first still run. Memory that is outgrown is not freed, for kernels in
// flight use it; sizes double, so this is less than what is in use.
//
// A captured call gets none from here: its graph may be replayed on any stream, at the same time as others that were
// captured on this one. It brings memory of the graph, and the graph fills it with zeros in every replay.
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
  static constexpr std::size_t kMost = 1024;  // streams: torch makes a few dozen, others may come and go without end

  // At least `count` counters for a kernel that follows on `stream` of the current device. Null where a call has to
  // bring its own: it is captured, there is no memory, or there are too many streams.
  unsigned* of(cudaStream_t stream, int64_t count) {
    unsigned* found = look(stream, count);
    if (found == nullptr) cudaGetLastError();  // so that it is not found by who asks next
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

  // Filled on the stream itself, so before the kernel that follows.
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

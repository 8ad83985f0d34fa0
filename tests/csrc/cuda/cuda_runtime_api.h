// The part of CUDA's runtime that csrc/cuda/workspace.h calls, on the host. Memory is filled with ones and never freed,
// and the calls are recorded.
#pragma once

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <utility>

enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation, cudaErrorStreamCaptureUnsupported };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };

struct CUstream_st {
  unsigned long long id;
  bool captured;
};
using cudaStream_t = CUstream_st*;

inline std::string calls;
inline int device = 0;
inline bool full = false;
inline cudaError_t last = cudaSuccess;
inline thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}

inline cudaError_t cudaGetDevice(int* found) {
  *found = device;
  return cudaSuccess;
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream->captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

inline cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  *id = stream->id;
  return cudaSuccess;
}

inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  std::swap(mode, *other);
  return cudaSuccess;
}

// Another thread may be capturing a graph: a call that may wait for the device would end the capture.
inline cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  if (mode != cudaStreamCaptureModeRelaxed) return last = cudaErrorStreamCaptureUnsupported;
  if (full) return last = cudaErrorMemoryAllocation;
  std::this_thread::sleep_for(std::chrono::milliseconds(1));  // so that threads meet here, unless a lock prevents it
  *memory = std::memset(std::malloc(bytes), 0xff, bytes);
  calls += "malloc " + std::to_string(bytes) + "\n";
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream) {
  if (stream->captured) return last = cudaErrorStreamCaptureUnsupported;
  std::memset(memory, value, bytes);
  calls += "memset " + std::to_string(bytes) + " on " + std::to_string(stream->id) + "\n";
  return cudaSuccess;
}

// Workspaces on a stand-in for CUDA, for test_workspace.py.
#include <utility>

#include "cuda/workspace.h"

extern "C" {

void* new_workspaces() { return new s0::gpu::Workspaces; }
void* of(void* all, CUstream_st* stream, int64_t count) {
  return static_cast<s0::gpu::Workspaces*>(all)->of(stream, count);
}
int64_t most_streams() { return s0::gpu::Workspaces::kMost; }

CUstream_st* new_stream() { return new CUstream_st{}; }
void set_stream(CUstream_st* stream, unsigned long long id, bool captured) { *stream = {id, captured}; }
void set_device(int number) { device = number; }
void set_full(bool is_full) { full = is_full; }
int last_error() { return last; }
int capture_mode() { return mode; }
const char* what_was_called() {
  static std::string told;
  told = std::exchange(calls, "");
  return told.c_str();
}
}

// Declares the kernels for library.cpp, which is compiled without CUDA's headers.
#pragma once

#include "token/arguments.h"

namespace s0::gpu {

// The workspace of a stream with at least `count` arrival counters, which are zero between kernels. Null if the call
// must bring its own. See workspace.h.
unsigned* workspace(void* stream, int64_t count);

// Launches the kernel. Returns null, or CUDA's error message.
const char* launch(const Delta& d, void* stream);
const char* launch(const Ssd& s, void* stream);

// Returns null if the current device can run the kernels, or else the reason why not.
const char* unusable();

}  // namespace s0::gpu

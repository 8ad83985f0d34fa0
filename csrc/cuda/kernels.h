// The kernels as library.cpp sees them, which is compiled without CUDA's headers.
#pragma once

#include "token/arguments.h"

namespace s0::gpu {

// A stream's workspace of at least `count` arrival counters, all zero between kernels; null where a call has to bring
// its own. See workspace.h.
unsigned* workspace(void* stream, int64_t count);

// Null, or what CUDA says is wrong.
const char* launch(const Delta& d, void* stream);
const char* launch(const Ssd& s, void* stream);

// Whether the current device can run them: null, or why not.
const char* unusable();

}  // namespace s0::gpu

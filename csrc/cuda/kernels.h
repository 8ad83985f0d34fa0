// The kernels as library.cpp sees them, which is compiled without CUDA's headers.
#pragma once

#include "cuda/arguments.h"

namespace s0::gpu {

// Null, or what CUDA says is wrong.
const char* launch(const Delta& d, void* stream);
const char* launch(const Ssd& s, void* stream);

// Whether the current device can run them: null, or why not.
const char* unusable();

}  // namespace s0::gpu

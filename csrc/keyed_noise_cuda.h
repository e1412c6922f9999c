// The `cuda` backend of keyed noise; see keyed_noise.h for the arithmetic.
#pragma once

#include "keyed_noise.h"

namespace flowmatch_kernels {

// Launches one draw on `stream`, a cudaStream_t of `device`, and does not wait for it. The calling thread's current
// device is the same before and after.
//
// Throws std::invalid_argument where the result is too large for one grid, and std::runtime_error, with CUDA's own
// words, where CUDA refuses.
void keyed_noise_cuda(const NoiseOperands& o, Dtype dtype, int device, void* stream);

}  // namespace flowmatch_kernels

// The `cuda` backend of fused_step; see fused_step.h for the operation.
#pragma once

#include "fused_step.h"

namespace flowmatch_kernels {

// Launches one fused step on `stream`, a cudaStream_t of `device`, and does not wait for it. The calling thread's
// current device is the same before and after.
//
// Throws std::invalid_argument where the dtypes do not go together or the state is too large for one grid, and
// std::runtime_error, with CUDA's own words, where CUDA refuses.
void fused_step_cuda(const Operands& o, Dtypes dtypes, int device, void* stream);

}  // namespace flowmatch_kernels

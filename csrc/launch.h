// Runs one fused step where its memory is: on torch's threads, or on a GPU's current stream.
#pragma once

#include "fused_step.h"

namespace flowmatch_kernels {

// Elements below which a second thread, or giving up Python's lock, costs more than it saves.
constexpr std::int64_t kGrain = 32768;

// On the CPU, by as many threads of torch's pool as are worth it. Throws where the velocity is wider than the state.
void launch_cpu(const Operands& o, Dtype state, Dtype velocity, bool velocity_rounding);

#ifdef FLOWMATCH_KERNELS_CUDA
// On the current stream of `device`; does not wait for it.
void launch_cuda(const Operands& o, Dtype state, Dtype velocity, bool velocity_rounding, int device);
#endif

}  // namespace flowmatch_kernels

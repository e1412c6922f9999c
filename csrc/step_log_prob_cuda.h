// The `cuda` backend of step_log_prob; see step_log_prob.h for the arithmetic.
#pragma once

#include "step_log_prob.h"

namespace flowmatch_kernels {

// Launches the log-probabilities of one step on `stream`, a cudaStream_t of `device`, and does not wait for them. The
// calling thread's current device is the same before and after.
//
// Throws std::invalid_argument where the dtypes do not go together or there are too many samples for one grid, and
// std::runtime_error, with CUDA's own words, where CUDA refuses.
void step_log_prob_cuda(const LogProbOperands& o, Dtype base, Dtype velocity, int device, void* stream);

}  // namespace flowmatch_kernels

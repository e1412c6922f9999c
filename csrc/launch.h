// Runs one fused step where its memory is: on torch's threads, or on a GPU's current stream.
#pragma once

#include "fused_step.h"

namespace flowmatch_kernels {

// Elements below which a second thread, or giving up Python's lock, costs more than it saves.
constexpr std::int64_t kGrain = 32768;

// On the CPU, by as many threads of torch's pool as are worth it. Throws where the velocity is wider than the state.
void launch_cpu(const Operands& o, Dtype state, Dtype velocity, bool velocity_rounding);

// On the current stream of `device`; does not wait for it. It lives in flowmatch_kernels._C_cuda, which hands it over
// in a capsule of this name.
using LaunchCuda = void(const Operands& o, Dtype state, Dtype velocity, bool velocity_rounding, int device);
constexpr const char* kLaunchCudaCapsule = "flowmatch_kernels.launch_cuda";

}  // namespace flowmatch_kernels

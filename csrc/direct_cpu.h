// The loop's direct calls to fused_step on the CPU, for Python. They ask tensors for what they need, as Python would.
#pragma once

#include <pybind11/pybind11.h>

#include "fused_step_cpu.h"

namespace flowmatch_kernels {

// One fused step on the CPU, by as many threads of torch's pool as are worth it.
void run_cpu(const Operands& o, Dtype state, Dtype velocity, bool velocity_rounding);

// Adds fused_step_cpu and Stepper to the extension module.
void add_direct_cpu(pybind11::module_& m);

}  // namespace flowmatch_kernels

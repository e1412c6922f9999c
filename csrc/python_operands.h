// For Python: one fused step with every operand given, and whether two velocities lie in one buffer.
#pragma once

#include <pybind11/pybind11.h>

namespace flowmatch_kernels {

// Adds fused_step_, use_cuda and apart to the extension module.
void add_fused_step(pybind11::module_& m);

}  // namespace flowmatch_kernels

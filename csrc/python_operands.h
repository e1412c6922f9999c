// One fused step with every operand given, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace flowmatch_kernels {

// Adds fused_step_ to the extension module.
void add_fused_step(pybind11::module_& m);

}  // namespace flowmatch_kernels

// A whole row of a table: call the model, look at what it returned, choose memory, take the step.
#pragma once

#include <pybind11/pybind11.h>

namespace flowmatch_kernels {

// Adds Rows to the extension module, where this torch can make a tensor over memory of ours.
void add_rows(pybind11::module_& m);

// Adds TensorRows, for states that PyTorch allocates.
void add_tensor_rows(pybind11::module_& m);

}  // namespace flowmatch_kernels

// What Python calls for keyed noise.
#pragma once

#include <pybind11/pybind11.h>

namespace flowmatch_kernels {

// Adds keyed_noise to the module.
void add_keyed_noise(pybind11::module_& m);

}  // namespace flowmatch_kernels

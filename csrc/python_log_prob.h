// What Python calls for the log-probability of a step.
#pragma once

#include <pybind11/pybind11.h>

namespace flowmatch_kernels {

// Adds step_log_prob to the module.
void add_step_log_prob(pybind11::module_& m);

}  // namespace flowmatch_kernels

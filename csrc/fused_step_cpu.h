// The `cpu` backend of fused_step; see fused_step.h for the operation.
#pragma once

#include "fused_step.h"

namespace flowmatch_kernels {

// Elements [begin, end) of one launch, on the calling thread. False where the dtypes do not go together.
bool fused_step_cpu(const Operands& o, Dtypes dtypes, std::int64_t begin, std::int64_t end);

// Name of the instruction set that fused_step_cpu uses on this machine.
const char* instruction_set();

}  // namespace flowmatch_kernels

// The `cpu` backend of step_log_prob; see step_log_prob.h for the arithmetic.
#pragma once

#include "step_log_prob.h"

namespace flowmatch_kernels {

// Samples [begin, end), on the calling thread, by the widest instruction set of this machine that is not beyond
// `level`: instruction_set.h numbers them. False where the dtypes do not go together; then nothing is written.
bool step_log_prob_cpu(const LogProbOperands& o, Dtype base, Dtype velocity, std::int64_t begin, std::int64_t end,
                       int level);

}  // namespace flowmatch_kernels

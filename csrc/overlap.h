// Which operands of a fused step may lie in the same memory: the rule for every C++ entry that users call.
// flowmatch_kernels.ops.fused_step.check_overlap is the same rule in Python, with the same words.
#pragma once

#include <optional>
#include <string>

#include "fused_step.h"

namespace flowmatch_kernels {

// What is written lies apart from every other operand: out, history, and the trajectory from the first element of its
// slot to the last. Two exceptions, each to the byte: out may be base of its dtype, and history one of h1..h3.
//
// None, or a sentence that says which two operands overlap, and how. Compares addresses only, of contiguous operands;
// `coefficients` are all [rows, 8] of them.
std::optional<std::string> overlap(const Operands& o, Dtypes dtypes, const void* coefficients, std::int64_t rows);

}  // namespace flowmatch_kernels

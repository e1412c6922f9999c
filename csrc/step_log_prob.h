// The arithmetic of step_log_prob for every C++ backend: one element, and what becomes of a sample's sum.
//
//   m   = a*base + b0*v
//   d   = next - m
//   out = sum(d*d) / n * scale + offset          over a sample's n elements, never an FMA
//
// With rows of their own a sample whose scale is 0 has d = 0, whatever the operands hold.
//
// kLanes partial sums, which begin at 0: lane j adds elements j, j + kLanes, ... in that order; then lane j adds lane
// j + kLanes/2, then lane j + kLanes/4, and so on. flowmatch_kernels/ops/step_log_prob.py is the contract and
// ops/reference_log_prob.py the definition; names agree. Knows nothing of Python or PyTorch.
#pragma once

#include "fused_step.h"

namespace flowmatch_kernels {

constexpr int kLanes = 1024;

// A row of densities: [rows, 2], column by column.
enum DensityColumn : int { kScale = 0, kOffset = 1, kDensityColumns = 2 };

// What a launch reads and writes. Every tensor is contiguous.
struct LogProbOperands {
  void* out;            // A[samples]
  const void* base;     // S[samples, elements]
  const void* v;        // V[samples, elements]
  const void* next;     // S[samples, elements]
  const void* row;      // A[8], or A[samples, 8]: a and b0 are read
  const void* density;  // A[2], or A[samples, 2]
  std::int64_t samples;
  std::int64_t elements;  // n, at least 1
  bool own_rows;          // each sample has a row of its own of both; else one row is for all
};

FLOWMATCH_INLINE float divide(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(x, y);
#else
  return x / y;
#endif
}
FLOWMATCH_INLINE double divide(double x, double y) {
#if defined(__CUDA_ARCH__)
  return __ddiv_rn(x, y);
#else
  return x / y;
#endif
}

// d*d of one element. next - m is next + (-m), to the bit.
template <class A>
FLOWMATCH_INLINE A square(A a, A base, A b0, A v, A next) {
  const A d = add(next, -add(multiply(a, base), multiply(b0, v)));
  return multiply(d, d);
}

template <class A>
FLOWMATCH_INLINE A log_prob(A sum, std::int64_t n, A scale, A offset, bool own_rows) {
  if (own_rows && scale == A(0)) sum = A(0);
  return add(multiply(divide(sum, static_cast<A>(n)), scale), offset);
}

// Calls f(Element{}) with the types S (as E::S), V and A; false where the dtypes do not go together.
template <class F>
bool dispatch_log_prob(Dtype base, Dtype velocity, F&& f) {
  return dispatch({.base = base, .velocity = velocity, .out = base}, Rounding::kPromote, false, f);
}

}  // namespace flowmatch_kernels

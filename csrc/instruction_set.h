// Which of the instruction sets that the `cpu` backend is compiled for this machine has.
#pragma once

namespace flowmatch_kernels {

// The last of them.
constexpr int kWidest = 2;

// 0: the baseline, SSE2 on x86-64. 1: AVX2 with FMA. 2: AVX-512. Elsewhere there is the baseline alone.
// Not `inline` alone: its answer would be one for all libraries of a process. tests/test_exactness.py sets `level`.
static inline int instruction_set_level() {
#if defined(__x86_64__)
  static const int level = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
                               ? 2
                           : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1
                                                                                             : 0;
  return level;
#else
  return 0;
#endif
}

}  // namespace flowmatch_kernels

#define FLOWMATCH_AVX2 __attribute__((target("avx2,fma")))
#define FLOWMATCH_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))

// step_log_prob on the CPU: the lanes of one sample stay in the L1 cache, and a pass over them takes a strip of it.
//
// Memory moved per element is the least possible: base, v and next are read once. Compiled for several instruction
// sets, as fused_step_cpu.cpp is: a lane is one element of a vector, whatever that is as wide as.
#include "step_log_prob_cpu.h"

#include <algorithm>

#include "instruction_set.h"

namespace flowmatch_kernels {
namespace {

template <class E>
FLOWMATCH_INLINE void samples(const LogProbOperands& o, std::int64_t begin, std::int64_t end) {
  using S = typename E::S;
  using V = typename E::V;
  using A = typename E::A;
  for (std::int64_t b = begin; b < end; ++b) {
    const std::int64_t its = o.own_rows ? b : 0;
    const A* row = static_cast<const A*>(o.row) + its * kColumns;
    const A* density = static_cast<const A*>(o.density) + its * kDensityColumns;
    const A a = row[kA], b0 = row[kB0];
    const S* base = static_cast<const S*>(o.base) + b * o.elements;
    const V* v = static_cast<const V*>(o.v) + b * o.elements;
    const S* next = static_cast<const S*>(o.next) + b * o.elements;
    A lanes[kLanes] = {};
    for (std::int64_t i = 0; i < o.elements; i += kLanes) {
      const std::int64_t n = std::min<std::int64_t>(kLanes, o.elements - i);
      for (std::int64_t j = 0; j < n; ++j) {
        const A squared = square<A>(a, static_cast<A>(widen(base[i + j])), b0, static_cast<A>(widen(v[i + j])),
                                    static_cast<A>(widen(next[i + j])));
        lanes[j] = add(lanes[j], squared);
      }
    }
    for (int width = kLanes / 2; width; width /= 2) {
      for (int j = 0; j < width; ++j) lanes[j] = add(lanes[j], lanes[j + width]);
    }
    static_cast<A*>(o.out)[b] = log_prob(lanes[0], o.elements, density[kScale], density[kOffset], o.own_rows);
  }
}

#if defined(__x86_64__)
template <class E>
FLOWMATCH_AVX2 void avx2(const LogProbOperands& o, std::int64_t begin, std::int64_t end) {
  samples<E>(o, begin, end);
}
template <class E>
FLOWMATCH_AVX512 void avx512(const LogProbOperands& o, std::int64_t begin, std::int64_t end) {
  samples<E>(o, begin, end);
}
#endif

template <class E>
void with_instruction_set(const LogProbOperands& o, std::int64_t begin, std::int64_t end, int level) {
#if defined(__x86_64__)
  level = std::min(level, instruction_set_level());
  if (level == 2) return avx512<E>(o, begin, end);
  if (level == 1) return avx2<E>(o, begin, end);
#endif
  samples<E>(o, begin, end);
}

}  // namespace

bool step_log_prob_cpu(const LogProbOperands& o, Dtype base, Dtype velocity, std::int64_t begin, std::int64_t end,
                       int level) {
  return dispatch_log_prob(base, velocity, [&]<class E>(E) { with_instruction_set<E>(o, begin, end, level); });
}

}  // namespace flowmatch_kernels

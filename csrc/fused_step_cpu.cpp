// fused_step on the CPU: strips that stay in the L1 cache, one pass for each term.
//
// Memory moved per element is the least possible: base, v, u and h are read once, out, slot and history written once.
// Noise is drawn strip by strip, and never leaves the L1 cache.
// Each loop is compiled for several instruction sets, and the widest that the machine has is chosen at run time, so
// that one build serves every x86-64. Elsewhere (arm64) the baseline is already vectorised.
#include "fused_step_cpu.h"

#include <algorithm>

#include "instruction_set.h"
#include "keyed_noise_cpu.h"

// Iterations are independent, though out may be base: element j is read before it is written.
#if defined(__clang__)
#define FLOWMATCH_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#else
#define FLOWMATCH_IVDEP _Pragma("GCC ivdep")
#endif

namespace flowmatch_kernels {
namespace {

constexpr std::int64_t kStrip = 1024;

template <class O>
FLOWMATCH_INLINE void copy_to_slot(const Operands& o, const O* out, std::int64_t begin, std::int64_t size) {
  for (std::int64_t done = 0; done < size;) {
    const std::int64_t i = begin + done;
    const std::int64_t run = std::min(size - done, o.sample - i % o.sample);
    std::memcpy(static_cast<O*>(o.trajectory) + trajectory_index(o, i), out + done, run * sizeof(O));
    done += run;
  }
}

// h1 at [i, i + n), where it is noise.
template <class A>
void draw(const Operands& o, std::int64_t i, std::int64_t n, A* z) {
  const auto* keys = static_cast<const std::int64_t*>(o.h[0]);
  if constexpr (std::is_same_v<A, float>) {
    keyed_noise_elements(keys, o.sample, i, n, z);
  } else {
    float narrow[kStrip];
    keyed_noise_elements(keys, o.sample, i, n, narrow);
    std::copy(narrow, narrow + n, z);
  }
}

// The sum of the terms at [i, i + n), before it is multiplied: from the oldest to h0.
template <class E>
FLOWMATCH_INLINE void sum_first(const typename E::A* row, const Operands& o, const typename E::V* h0, std::int64_t i,
                                std::int64_t n, typename E::S* sums) {
  using A = typename E::A;
  const A b0 = row[kB0], b1 = row[kB1];
  int terms = 0;
  const A* h[3] = {};
  for (; terms < 3 && o.h[terms]; ++terms) h[terms] = static_cast<const A*>(o.h[terms]) + i;
  if (terms == 0) {
    FLOWMATCH_IVDEP
    for (std::int64_t j = 0; j < n; ++j) sums[j] = E::oldest(b0, static_cast<A>(widen(h0[j])));
    return;
  }
  const A b = row[kB0 + terms];
  const A *const first = h[terms - 1], *const h1 = h[0], *const h2 = h[1];
  FLOWMATCH_IVDEP
  for (std::int64_t j = 0; j < n; ++j) sums[j] = E::oldest(b, first[j]);
  if (terms == 2) {
    FLOWMATCH_IVDEP
    for (std::int64_t j = 0; j < n; ++j) sums[j] = E::accumulate(sums[j], b1, h1[j]);
  } else if (terms == 3) {
    FLOWMATCH_IVDEP
    for (std::int64_t j = 0; j < n; ++j) sums[j] = E::accumulate(sums[j], b1, E::pair(h2[j], h1[j]));
  }
  FLOWMATCH_IVDEP
  for (std::int64_t j = 0; j < n; ++j) sums[j] = E::accumulate(sums[j], b0, static_cast<A>(widen(h0[j])));
}

// Elements [begin, end), which use one row.
template <class E>
FLOWMATCH_INLINE void strips(const Operands& o, const void* row_of, std::int64_t begin, std::int64_t end) {
  using B = typename E::B;
  using V = typename E::V;
  using O = typename E::O;
  using S = typename E::S;
  using A = typename E::A;
  using Weight = typename E::Weight;
  // Sums need room of their own where out cannot hold them, or is base and base enters last.
  constexpr bool kApart = E::kSumFirst || !std::is_same_v<S, O>;
  const A* row = static_cast<const A*>(row_of);
  const A a = row[kA], b0 = E::coefficient(row[kB0], o.rounding), c = row[kC];
  const Weight w0 = static_cast<Weight>(row[kW0]), w1 = static_cast<Weight>(row[kW1]);
  const auto left_out = [&](int column) { return o.rows && row[column] == A(0); };
  V guided[kStrip];
  A remembered[kStrip], drawn[kStrip];
  S sums[kApart ? kStrip : 1];
  // With one loop and no room of its own, all at once: at the end of a loop a processor loses the loads under way,
  // which in place takes a fifth longer where the state fills the last cache.
  const bool one_pass = !(kApart || o.u || o.history || o.h[0] || o.trajectory);
  const std::int64_t strip = one_pass ? end - begin : kStrip;
  for (std::int64_t i = begin; i < end; i += strip) {
    const std::int64_t n = std::min(strip, end - i);
    O* out = static_cast<O*>(o.out) + i;
    const B* base = static_cast<const B*>(o.base) + i;
    const V* v = static_cast<const V*>(o.v) + i;
    const V* h0 = v;
    if (o.u) {
      const V* u = static_cast<const V*>(o.u) + i;
      if (o.guidance == Guidance::kWeighted) {
        FLOWMATCH_IVDEP
        for (std::int64_t j = 0; j < n; ++j) guided[j] = E::weighted(w0, u[j], w1, v[j]);
      } else {
        const V* x = o.guidance == Guidance::kFromUnguided ? u : v;
        FLOWMATCH_IVDEP
        for (std::int64_t j = 0; j < n; ++j) guided[j] = E::from(x[j], w1, v[j], u[j]);
      }
      h0 = guided;
    }
    if (o.history) {  // before out, which may be base
      FLOWMATCH_IVDEP
      for (std::int64_t j = 0; j < n; ++j) remembered[j] = E::remember(static_cast<A>(widen(h0[j])), c, base[j]);
    }
    if constexpr (E::kSumFirst) {
      sum_first<E>(row, o, h0, i, n, sums);
      FLOWMATCH_IVDEP
      for (std::int64_t j = 0; j < n; ++j) out[j] = E::stepped(base[j], sums[j], a, c);
    } else {
      S* const sum = kApart ? sums : reinterpret_cast<S*>(out);
      if (left_out(kB0)) {
        FLOWMATCH_IVDEP
        for (std::int64_t j = 0; j < n; ++j) sum[j] = E::start(a, base[j]);
      } else if (E::kHasStrength && o.strength) {
        const S* strength = static_cast<const S*>(o.strength) + i;
        FLOWMATCH_IVDEP
        for (std::int64_t j = 0; j < n; ++j) {
          sum[j] = E::accumulate(E::start(a, base[j]), b0, static_cast<A>(widen(h0[j])), strength[j]);
        }
      } else {
        FLOWMATCH_IVDEP
        for (std::int64_t j = 0; j < n; ++j) {
          sum[j] = E::accumulate(E::start(a, base[j]), b0, static_cast<A>(widen(h0[j])));
        }
      }
      for (int k = 0; k < 3 && o.h[k]; ++k) {
        if (left_out(kB1 + k)) continue;
        const A b = E::coefficient(row[kB1 + k], o.rounding);
        const A* h = static_cast<const A*>(o.h[k]) + i;
        if (k == 0 && o.keyed) {
          draw(o, i, n, drawn);
          h = drawn;
        }
        FLOWMATCH_IVDEP
        for (std::int64_t j = 0; j < n; ++j) sum[j] = E::accumulate(sum[j], b, h[j]);
      }
      if constexpr (kApart) {
        FLOWMATCH_IVDEP
        for (std::int64_t j = 0; j < n; ++j) out[j] = E::stored(sum[j]);
      }
    }
    if (o.history) std::memcpy(static_cast<A*>(o.history) + i, remembered, n * sizeof(A));
    if (o.trajectory) copy_to_slot(o, out, i, n);
  }
}

// Elements [begin, end): those of each row in turn.
template <class E>
FLOWMATCH_INLINE void spans(const Operands& o, std::int64_t begin, std::int64_t end) {
  while (begin < end) {
    const std::int64_t number = o.rows ? begin / o.span() : 0;
    const std::int64_t stop = o.rows ? std::min(end, (number + 1) * o.span()) : end;
    strips<E>(o, static_cast<const typename E::A*>(o.row) + number * kColumns, begin, stop);
    begin = stop;
  }
}

struct Baseline {
  static constexpr const char* kName =
#if defined(__aarch64__)
      "arm64 (NEON)";
#elif defined(__x86_64__)
      "x86-64 (SSE2)";
#else
      "baseline";
#endif
  template <class E>
  static void run(const Operands& o, std::int64_t begin, std::int64_t end) {
    spans<E>(o, begin, end);
  }
};

#if defined(__x86_64__)
struct Avx2 {
  static constexpr const char* kName = "AVX2";
  template <class E>
  FLOWMATCH_AVX2 static void run(const Operands& o, std::int64_t begin, std::int64_t end) {
    spans<E>(o, begin, end);
  }
};

struct Avx512 {
  static constexpr const char* kName = "AVX-512";
  template <class E>
  FLOWMATCH_AVX512 static void run(const Operands& o, std::int64_t begin, std::int64_t end) {
    spans<E>(o, begin, end);
  }
};

// Calls f with the widest instruction set of this machine.
template <class F>
auto with_instruction_set(F&& f) {
  const int level = instruction_set_level();
  return level == 2 ? f(Avx512{}) : level == 1 ? f(Avx2{}) : f(Baseline{});
}
#else
template <class F>
auto with_instruction_set(F&& f) {
  return f(Baseline{});
}
#endif

}  // namespace

bool fused_step_cpu(const Operands& o, Dtypes dtypes, std::int64_t begin, std::int64_t end) {
  return dispatch(dtypes, o.rounding, o.sum_first, [&]<class E>(E) {
    with_instruction_set([&](auto set) { decltype(set)::template run<E>(o, begin, end); });
  });
}

const char* instruction_set() {
  return with_instruction_set([](auto set) { return decltype(set)::kName; });
}

}  // namespace flowmatch_kernels

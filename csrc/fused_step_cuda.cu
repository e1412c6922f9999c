// fused_step on a CUDA device: one launch, one thread for 16 bytes of the widest operand.
//
// Bytes moved per element are the least possible: s = sizeof(S), w = sizeof(V), h = sizeof(A): s for base, w for each
// of v and u, h for each of h1..h3 are read once; s for out, s for the slot and h for the history are written once. A
// plain step with a float32 state and velocity moves 12 bytes, with a bfloat16 velocity 10. The row of coefficients,
// 32 bytes (64 for float64), is one line that every thread finds in the L1 cache.
//
// Needs nothing of Python or PyTorch, and of CUDA only what tests/host_cuda/cuda_runtime.h doubles: there the same
// source is compiled for the host, every thread of a grid run, and every access recorded.
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda_launch.h"
#include "cuda_memory.h"
#include "fused_step_cuda.h"
#include "keyed_noise.h"

namespace flowmatch_kernels {
namespace {

// Blocks that a multiprocessor holds at once: 6 leave each thread 40 registers. The 64-bit operands of float64 states
// would spill (4 bytes, sm_90): 5 leave them 48, but with every operand (4 bytes, sm_100). On sm_75 the 1024 threads
// that fit are 4 blocks with 64 registers; so where vectors have rows of their own, a kernel that holds every operand
// (32 bytes spilled at 40 registers, sm_90); and where h1 is noise (8 bytes at 48).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kFewThreads = true;
#else
constexpr bool kFewThreads = false;
#endif
template <class S, class Present, int kSize>
constexpr int blocks_at_once() {
  return kFewThreads || Present::kDrawn || (Present::kOwnRows && kSize > 1) ? 4
         : sizeof(S) == 8                                                   ? (Present::kEveryOperand ? 4 : 5)
                                                                            : 6;
}

// ---- the kernel ----

// Which optional operands are read. Known to the compiler where vectors are moved: with branches about them it waited
// for v before it asked for u (bfloat16 v, sm_90), and used 48 registers where 32 are enough.
template <bool kGuided, int kTerms, bool kStrength>
struct Known {
  static constexpr bool kOwnRows = false, kDrawn = false;
  static constexpr bool kEveryOperand = kGuided && kTerms == 3;
  __device__ __forceinline__ explicit Known(const Operands&) {}
  __device__ __forceinline__ constexpr bool u() const { return kGuided; }
  __device__ __forceinline__ constexpr bool strength() const { return kStrength; }
  __device__ __forceinline__ constexpr bool h(int k) const { return k < kTerms; }
};
// Asked of the operands, where elements are moved one by one, have rows of their own, or h1 is noise: the same branch
// for every thread. The latter two are kernels of their own, so that the others cost nothing more.
template <bool kOwnRows_, bool kDrawn_ = false>
struct Tested {
  static constexpr bool kOwnRows = kOwnRows_;  // with kDrawn there may be some, or one row for all elements
  static constexpr bool kDrawn = kDrawn_;      // h1 is noise
  static constexpr bool kEveryOperand = false;
  const Operands& o;
  __device__ __forceinline__ explicit Tested(const Operands& operands) : o(operands) {}
  __device__ __forceinline__ bool u() const { return o.u != nullptr; }
  __device__ __forceinline__ bool strength() const { return o.strength != nullptr; }
  __device__ __forceinline__ bool h(int k) const { return o.h[k] != nullptr; }
};

// Elements [element, element + kSize) of the noise of one sample, in A. They are of one counter, of which a thread
// makes what it needs: kSize 4 is on a boundary of four.
template <class A, int kSize>
__device__ __forceinline__ Vector<A, kSize> noise(const Operands& o, std::int64_t sample, std::int64_t element) {
  std::int64_t key[3];
#pragma unroll
  for (int k = 0; k < 3; ++k) key[k] = LoadConstant{}(static_cast<const std::int64_t*>(o.h[0]) + 3 * sample + k);
  const std::int64_t block = element / 4;
  const Counter with = counter(key, 0, block);
  const Words words = philox(static_cast<std::uint32_t>(block), with.c1, with.c2, with.c3, with.k0, with.k1);
  Vector<A, kSize> z;
  if constexpr (kSize == 4) {
    float drawn[4];
    normals(words.w[0], words.w[1], drawn[0], drawn[1]);
    normals(words.w[2], words.w[3], drawn[2], drawn[3]);
#pragma unroll
    for (int j = 0; j < 4; ++j) z[j] = drawn[j];
  } else {
    static_assert(kSize <= 2);
    const bool later = element % 4 >= 2;
    float drawn[2];
    normals(later ? words.w[2] : words.w[0], later ? words.w[3] : words.w[1], drawn[0], drawn[1]);
    z[0] = kSize == 2 || element % 2 == 0 ? drawn[0] : drawn[1];
    if constexpr (kSize == 2) z[1] = drawn[1];
  }
  return z;
}

// Elements [i, i + kSize). All of their operands are read before any is written: out may be base, and history one of h.
template <class E, class Present, int kSize>
__device__ __forceinline__ void step(const Operands& o, const Divisor& divisor, const typename E::A* row,
                                     std::int64_t i) {
  using A = typename E::A;
  using Weight = typename E::Weight;
  using Velocities = Vector<typename E::V, kSize>;
  using History = Vector<A, kSize>;
  const Present present(o);

  Velocities h0 = Velocities::from(o.v, i, LoadLast{});
  Velocities u;
  if (present.u()) u = Velocities::from(o.u, i, LoadLast{});
  const auto base = Vector<typename E::B, kSize>::from(o.base, i, Load{});
  History h1, h2, h3;
  const bool own_rows = Present::kOwnRows && (!Present::kDrawn || o.rows);
  const auto sample_of = [&](std::int64_t element) {
    const std::int64_t part = divisor.quotient(element);
    return own_rows ? static_cast<std::uint32_t>(part) / o.rows : part;  // `launch` has rows fit 32 bits
  };
  if constexpr (Present::kDrawn) {
    const std::int64_t sample = sample_of(i);
    h1 = noise<A, kSize>(o, sample, i - sample * o.sample);
  } else {
    if (present.h(0)) h1 = History::from(o.h[0], i, Load{});
  }
  if (present.h(1)) h2 = History::from(o.h[1], i, Load{});
  if (present.h(2)) h3 = History::from(o.h[2], i, Load{});
  Vector<typename E::O, kSize> strength;
  if (E::kHasStrength && present.strength()) strength = Vector<typename E::O, kSize>::from(o.strength, i, Load{});

  if (present.u()) {
    const Weight w0 = static_cast<Weight>(row[kW0]), w1 = static_cast<Weight>(row[kW1]);
    if (o.guidance == Guidance::kWeighted) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) h0[j] = E::weighted(w0, u[j], w1, h0[j]);
    } else {
      const bool unguided = o.guidance == Guidance::kFromUnguided;
#pragma unroll
      for (int j = 0; j < kSize; ++j) h0[j] = E::from(unguided ? u[j] : h0[j], w1, h0[j], u[j]);
    }
  }
  const auto h0_at = [&](int j) { return static_cast<A>(widen(h0[j])); };
  const A a = row[kA];
  Vector<typename E::S, kSize> sum;
  const auto left_out = [&](Column column) { return own_rows && row[column] == A(0); };
  const auto coefficient = [&](Column column) {
    return Present::kOwnRows ? E::coefficient(row[column], o.rounding) : row[column];
  };
  const auto accumulate = [&](const auto& h, Column column) {
    if (left_out(column)) return;
    const A b = coefficient(column);
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum[j] = E::accumulate(sum[j], b, h(j));
  };
  if constexpr (E::kSumFirst) {  // from the oldest term to h0
    const auto oldest = [&](const auto& h, Column column) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum[j] = E::oldest(row[column], h(j));
    };
    if (present.h(2)) {
      oldest([&](int j) { return h3[j]; }, kB3);
      accumulate([&](int j) { return E::pair(h2[j], h1[j]); }, kB1);
    } else if (present.h(1)) {
      oldest([&](int j) { return h2[j]; }, kB2);
      accumulate([&](int j) { return h1[j]; }, kB1);
    } else if (present.h(0)) {
      oldest([&](int j) { return h1[j]; }, kB1);
    }
    present.h(0) ? accumulate(h0_at, kB0) : oldest(h0_at, kB0);
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum[j] = E::stepped(base[j], sum[j], a, row[kC]);
  } else {
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum[j] = E::start(a, base[j]);
    if (E::kHasStrength && present.strength()) {
      if constexpr (E::kHasStrength) {
        if (!left_out(kB0)) {
#pragma unroll
          for (int j = 0; j < kSize; ++j) sum[j] = E::accumulate(sum[j], coefficient(kB0), h0_at(j), strength[j]);
        }
      }
    } else {
      accumulate(h0_at, kB0);
    }
    if (present.h(0)) accumulate([&](int j) { return h1[j]; }, kB1);
    if (present.h(1)) accumulate([&](int j) { return h2[j]; }, kB2);
    if (present.h(2)) accumulate([&](int j) { return h3[j]; }, kB3);
  }
  Vector<typename E::O, kSize> out;
#pragma unroll
  for (int j = 0; j < kSize; ++j) out[j] = E::stored(sum[j]);

  out.to(o.out, i, Store{});
  if (o.trajectory) out.to(o.trajectory, trajectory_index(o, i, sample_of(i)), StoreLast{});
  if (o.history) {
    History remembered;
#pragma unroll
    for (int j = 0; j < kSize; ++j) remembered[j] = E::remember(h0_at(j), row[kC], base[j]);
    remembered.to(o.history, i, Store{});
  }
}

// Thread t takes vector t; threads after the last whole vector take one of the elements that are left over.
// With kSize 1 nothing but an element's own alignment is asked.
template <class E, class Present, int kSize>
__global__ void __launch_bounds__(kThreads, blocks_at_once<typename E::B, Present, kSize>())
    fused_step_kernel(const Operands o, const Divisor divisor) {
  using A = typename E::A;
  constexpr int kRowWord = kSize > 1 ? kAccess / sizeof(A) : 1;
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t vectors = o.numel / kSize;
  const std::int64_t left = vectors * kSize + (thread - vectors);
  if (thread >= vectors && left >= o.numel) return;

  // Asked for first, so that the row is under way while the operands' addresses are computed.
  const A* row_of = static_cast<const A*>(o.row);
  if (Present::kOwnRows && (!Present::kDrawn || o.rows)) row_of += divisor.quotient(thread * kSize) * kColumns;
  A row[kColumns];
#pragma unroll
  for (int k = 0; k < kColumns; k += kRowWord) {
    const auto part = Vector<A, kRowWord>::from(row_of, k, LoadConstant{});
#pragma unroll
    for (int j = 0; j < kRowWord; ++j) row[k + j] = part[j];
  }
#pragma unroll
  for (int k = kB0; k <= kB3 && !Present::kOwnRows; ++k) row[k] = E::coefficient(row[k], o.rounding);
  // With rows of their own, or noise, no element is left over: `fits` has each row, or sample, cover whole vectors.
  if (Present::kOwnRows || kSize == 1 || thread < vectors) {
    step<E, Present, kSize>(o, divisor, row, thread * kSize);
  } else {
    step<E, Present, 1>(o, divisor, row, left);
  }
}

// ---- the launch ----

// Whether every operand can be moved kSize elements at a time.
template <class E, int kSize>
bool fits(const Operands& o) {
  const auto aligned = [](const void* address, std::size_t element) {
    return reinterpret_cast<std::uintptr_t>(address) % std::min<std::size_t>(kSize * element, kAccess) == 0;
  };
  const auto result = [&](const void* address) { return aligned(address, sizeof(typename E::O)); };
  const auto velocity = [&](const void* address) { return aligned(address, sizeof(typename E::V)); };
  const auto history = [&](const void* address) { return aligned(address, sizeof(typename E::A)); };
  return result(o.out) && result(o.strength) && aligned(o.base, sizeof(typename E::B)) && velocity(o.v) &&
         velocity(o.u) && (o.keyed || history(o.h[0])) && history(o.h[1]) && history(o.h[2]) && history(o.history) &&
         reinterpret_cast<std::uintptr_t>(o.row) % kAccess == 0 && result(o.trajectory) &&
         (!o.trajectory || o.sample % kSize == 0) && (!o.rows || o.span() % kSize == 0) &&
         (!o.keyed || o.sample % 4 == 0);
}

template <class E, class Present, int kSize>
void launch(const Operands& o, cudaStream_t stream) {
  const std::int64_t threads = o.numel / kSize + o.numel % kSize;
  if (o.rows && o.numel / o.span() > std::numeric_limits<std::uint32_t>::max()) {
    throw std::invalid_argument("fused_step: " + std::to_string(o.numel / o.span()) + " rows are too many");
  }
  // Of an element: its row, with rows of their own, or its sample.
  Divisor divisor(static_cast<std::uint64_t>(o.rows ? o.span() : o.trajectory || o.keyed ? o.sample : 1));
  void* arguments[] = {const_cast<Operands*>(&o), &divisor};
  launch_blocks(&fused_step_kernel<E, Present, kSize>, blocks_for(threads), arguments, stream, "fused_step", o.numel);
}

// One thread takes 16 bytes of the widest operand read: 4 elements where that is float32, 2 for float64, 8 for 16 bits.
template <class E, bool kGuided, int kTerms>
void launch_widest(const Operands& o, cudaStream_t stream) {
  constexpr std::size_t kWidest =
      kTerms ? sizeof(typename E::A) : std::max(sizeof(typename E::B), sizeof(typename E::V));
  constexpr int kSize = kAccess / kWidest;
  constexpr bool kStrength = E::kHasStrength && kTerms == 0;  // of Euler's step; elsewhere one by one
  if (o.strength && !E::kHasStrength) {
    throw std::invalid_argument("fused_step: strength needs out of base's dtype, and no sum_first");
  }
  if ((o.strength && !kStrength) || !fits<E, kSize>(o)) return launch<E, Tested<false>, 1>(o, stream);
  if (o.strength) return launch<E, Known<kGuided, kTerms, kStrength>, kSize>(o, stream);
  launch<E, Known<kGuided, kTerms, false>, kSize>(o, stream);
}

template <class E, bool kGuided>
void launch_terms(const Operands& o, cudaStream_t stream) {
  if (o.h[2]) return launch_widest<E, kGuided, 3>(o, stream);
  if (o.h[1]) return launch_widest<E, kGuided, 2>(o, stream);
  if (o.h[0]) return launch_widest<E, kGuided, 1>(o, stream);
  launch_widest<E, kGuided, 0>(o, stream);
}

// Two kernels for a set of dtypes, with vectors as for history terms: what else is there they ask.
template <class E, class Present>
void launch_tested(const Operands& o, cudaStream_t stream) {
  constexpr int kSize = kAccess / sizeof(typename E::A);
  fits<E, kSize>(o) ? launch<E, Present, kSize>(o, stream) : launch<E, Present, 1>(o, stream);
}

template <class E>
void launch_own_rows(const Operands& o, cudaStream_t stream) {
  if constexpr (E::kSumFirst) {
    throw std::invalid_argument("fused_step: sum_first does not go with rows of their own");
  } else {
    launch_tested<E, Tested<true>>(o, stream);
  }
}

template <class E>
void launch_drawn(const Operands& o, cudaStream_t stream) {
  if constexpr (!E::kHasStrength) {
    throw std::invalid_argument("fused_step: h1 of keys needs out of base's dtype, and no sum_first");
  } else {
    launch_tested<E, Tested<true, true>>(o, stream);
  }
}

}  // namespace

void fused_step_cuda(const Operands& o, Dtypes dtypes, int device, void* stream) {
  if (o.numel == 0) return;  // an empty grid is an error
  const DeviceGuard guard(device, "fused_step");
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const auto chosen = [&]<class E>(E) {
    if (o.keyed) return launch_drawn<E>(o, on);
    if (o.rows) return launch_own_rows<E>(o, on);
    o.u ? launch_terms<E, true>(o, on) : launch_terms<E, false>(o, on);
  };
  if (!dispatch(dtypes, o.rounding, o.sum_first, chosen)) {
    throw std::invalid_argument("fused_step: the dtypes do not go together");
  }
}

}  // namespace flowmatch_kernels

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

#include "fused_step_cuda.h"

#ifndef FLOWMATCH_LOAD
#define FLOWMATCH_LOAD(address) (*(address))
#define FLOWMATCH_STORE(address, word) (*(address) = (word))
#endif

namespace flowmatch_kernels {
namespace {

constexpr int kAccess = 16;  // bytes, the widest load and store of every architecture
constexpr int kThreads = 256;

// Blocks that a multiprocessor holds at once: 6 leave each thread 40 registers. The 64-bit operands of float64 states
// would spill (4 bytes, sm_90): 5 leave them 48. On sm_75 the 1024 threads that fit are 4 blocks with 64 registers.
template <class S>
constexpr int blocks_at_once() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return 4;
#else
  return sizeof(S) == 8 ? 5 : 6;
#endif
}

// ---- memory ----

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// kSize elements that one thread holds, moved in as few accesses as there can be.
template <class T, int kSize>
struct Vector {
  static constexpr int kBytes = kSize * sizeof(T);
  static constexpr int kWord = kBytes < kAccess ? kBytes : kAccess;
  static constexpr int kWords = kBytes / kWord;
  using W = typename Word<kWord>::type;

  T element[kSize];

  __device__ __forceinline__ T& operator[](int j) { return element[j]; }
  __device__ __forceinline__ const T& operator[](int j) const { return element[j]; }

  // f(address) is the load of one word.
  template <class Load>
  static __device__ __forceinline__ Vector from(const void* address, std::int64_t i, Load load) {
    const W* source = reinterpret_cast<const W*>(static_cast<const T*>(address) + i);
    W words[kWords];
#pragma unroll
    for (int k = 0; k < kWords; ++k) words[k] = load(source + k);
    Vector vector;
    std::memcpy(vector.element, words, kBytes);
    return vector;
  }
  template <class Store>
  __device__ __forceinline__ void to(void* address, std::int64_t i, Store store) const {
    W words[kWords];
    std::memcpy(words, element, kBytes);
    W* target = reinterpret_cast<W*>(static_cast<T*>(address) + i);
#pragma unroll
    for (int k = 0; k < kWords; ++k) store(target + k, words[k]);
  }
};

// Constant while the kernel runs, and wanted by every thread.
struct LoadConstant {
  template <class W>
  __device__ __forceinline__ W operator()(const W* address) const {
    return __ldg(address);
  }
};
// May be written by this kernel.
struct Load {
  template <class W>
  __device__ __forceinline__ W operator()(const W* address) const {
    return FLOWMATCH_LOAD(address);
  }
};
// Dead after this read: the first to leave the cache. A term of the history is not: k1 of rk4 is read again by its last
// row, and Adams-Bashforth's velocities by the next steps.
struct LoadLast {
  template <class W>
  __device__ __forceinline__ W operator()(const W* address) const {
    return __ldcs(address);
  }
};
// Read soon: out by the model, history by the next steps.
struct Store {
  template <class W>
  __device__ __forceinline__ void operator()(W* address, W word) const {
    FLOWMATCH_STORE(address, word);
  }
};
// Not read before sampling ends.
struct StoreLast {
  template <class W>
  __device__ __forceinline__ void operator()(W* address, W word) const {
    __stcs(address, word);
  }
};

// ---- the trajectory's index ----

// Division by the elements of one sample, as a multiplication: a 64-bit division is a call of some 80 instructions, and
// made the float64 kernel spill (8 bytes, sm_80). Exact for 0 <= i < 2^63 (Granlund and Montgomery, PLDI 1994, with 63
// bits: the multiplier then has 64).
struct Divisor {
  std::uint64_t multiplier;  // 2^(63 + shift) / divisor, rounded up
  int shift;                 // the least with 2^shift >= divisor

  explicit Divisor(std::uint64_t divisor) : shift(0) {
    while ((std::uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<std::uint64_t>((static_cast<unsigned __int128>(1) << (63 + shift)) / divisor + 1);
  }
  // i / divisor
  __device__ __forceinline__ std::int64_t quotient(std::int64_t i) const {
    return static_cast<std::int64_t>(__umul64hi(static_cast<std::uint64_t>(i) << 1, multiplier) >> shift);
  }
};

// ---- the kernel ----

// Which optional operands are read. Known to the compiler where vectors are moved: with branches about them it waited
// for v before it asked for u (bfloat16 v, sm_90), and used 48 registers where 32 are enough.
template <bool kGuided, int kTerms, bool kStrength>
struct Known {
  __device__ __forceinline__ explicit Known(const Operands&) {}
  __device__ __forceinline__ constexpr bool u() const { return kGuided; }
  __device__ __forceinline__ constexpr bool strength() const { return kStrength; }
  __device__ __forceinline__ constexpr bool h(int k) const { return k < kTerms; }
};
// Asked of the operands, where elements are moved one by one: the same branch for every thread.
struct Tested {
  const Operands& o;
  __device__ __forceinline__ explicit Tested(const Operands& operands) : o(operands) {}
  __device__ __forceinline__ bool u() const { return o.u != nullptr; }
  __device__ __forceinline__ bool strength() const { return o.strength != nullptr; }
  __device__ __forceinline__ bool h(int k) const { return o.h[k] != nullptr; }
};

// Elements [i, i + kSize). All of their operands are read before any is written: out may be base, and history one of h.
template <class E, class Present, int kSize>
__device__ __forceinline__ void step(const Operands& o, const Divisor& by_sample, const typename E::A* row,
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
  if (present.h(0)) h1 = History::from(o.h[0], i, Load{});
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
  const auto accumulate = [&](const auto& h, Column column) {
    const A b = row[column];
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
#pragma unroll
        for (int j = 0; j < kSize; ++j) sum[j] = E::accumulate(sum[j], row[kB0], h0_at(j), strength[j]);
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
  if (o.trajectory) out.to(o.trajectory, trajectory_index(o, i, by_sample.quotient(i)), StoreLast{});
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
__global__ void __launch_bounds__(kThreads, blocks_at_once<typename E::B>())
    fused_step_kernel(const Operands o, const Divisor by_sample) {
  using A = typename E::A;
  constexpr int kRowWord = kSize > 1 ? kAccess / sizeof(A) : 1;
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t vectors = o.numel / kSize;
  const std::int64_t left = vectors * kSize + (thread - vectors);
  if (thread >= vectors && left >= o.numel) return;

  // Asked for first, so that the row is under way while the operands' addresses are computed.
  A row[kColumns];
#pragma unroll
  for (int k = 0; k < kColumns; k += kRowWord) {
    const auto part = Vector<A, kRowWord>::from(o.row, k, LoadConstant{});
#pragma unroll
    for (int j = 0; j < kRowWord; ++j) row[k + j] = part[j];
  }
#pragma unroll
  for (int k = kB0; k <= kB3; ++k) row[k] = E::coefficient(row[k], o.rounding);
  if (kSize == 1 || thread < vectors) {
    step<E, Present, kSize>(o, by_sample, row, thread * kSize);
  } else {
    step<E, Present, 1>(o, by_sample, row, left);
  }
}

// ---- the launch ----

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // CUDA keeps it for whoever asks next, who is not to blame
  throw std::runtime_error(std::string("fused_step: ") + call + ": " + cudaGetErrorString(error));
}

// Makes `device` current, and the former one when it goes.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&former_), "cudaGetDevice");
    if (former_ == device) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(former_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = 0;
  bool changed_ = false;
};

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
         velocity(o.u) && history(o.h[0]) && history(o.h[1]) && history(o.h[2]) && history(o.history) &&
         reinterpret_cast<std::uintptr_t>(o.row) % kAccess == 0 && result(o.trajectory) &&
         (!o.trajectory || o.sample % kSize == 0);
}

template <class E, class Present, int kSize>
void launch(const Operands& o, cudaStream_t stream) {
  const std::int64_t threads = o.numel / kSize + o.numel % kSize;
  const std::int64_t blocks = (threads - 1) / kThreads + 1;
  if (blocks > std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument("fused_step: a state of " + std::to_string(o.numel) + " elements is too large");
  }
  Divisor by_sample(static_cast<std::uint64_t>(o.trajectory ? o.sample : 1));
  void* arguments[] = {const_cast<Operands*>(&o), &by_sample};
  check(cudaLaunchKernel(&fused_step_kernel<E, Present, kSize>, dim3(static_cast<unsigned int>(blocks)), dim3(kThreads),
                         arguments, 0, stream),
        "cudaLaunchKernel");
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
  if ((o.strength && !kStrength) || !fits<E, kSize>(o)) return launch<E, Tested, 1>(o, stream);
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

}  // namespace

void fused_step_cuda(const Operands& o, Dtypes dtypes, int device, void* stream) {
  if (o.numel == 0) return;  // an empty grid is an error
  const DeviceGuard guard(device);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const auto chosen = [&]<class E>(E) { o.u ? launch_terms<E, true>(o, on) : launch_terms<E, false>(o, on); };
  if (!dispatch(dtypes, o.rounding, o.sum_first, chosen)) {
    throw std::invalid_argument("fused_step: the dtypes do not go together");
  }
}

}  // namespace flowmatch_kernels

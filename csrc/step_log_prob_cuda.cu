// step_log_prob on a CUDA device: one launch, one block for each sample.
//
// A thread holds kHeld neighbouring lanes in registers, and walks through the sample in strips of kLanes elements. Then
// the upper half of the threads hands its lanes over in shared memory, and the lower half adds them; and so on, until
// the first thread has the last kHeld lanes. So each sum has the two terms that the contract names, whatever the batch.
//
// Bytes moved per element are the least possible: base, v and next are read once. The rows of coefficients and
// densities are lines that every thread finds in the L1 cache.
//
// Needs nothing of Python or PyTorch, and of CUDA only what tests/host_cuda/cuda_runtime.h doubles.
#include <cuda_runtime.h>

#include <stdexcept>

#include "cuda_launch.h"
#include "cuda_memory.h"
#include "step_log_prob_cuda.h"

namespace flowmatch_kernels {
namespace {

constexpr int kHeld = kLanes / kThreads;  // lanes of one thread
// Blocks that a multiprocessor holds at once: 4 leave each thread 64 registers, for the loads of four strips. Without a
// bound ptxas took 48 for float64 states with float32 velocities, and spilled (8 bytes, sm_90).
constexpr int kBlocksAtOnce = 4;

// With kSize kHeld a thread's elements are all there or none, and on a boundary; with 1 each is asked for. Rows of
// their own are a kernel of their own: one row for all samples costs nothing more (with a branch 8 registers, sm_80).
template <class S, class V, bool kOwnRows, int kSize>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) step_log_prob_kernel(const LogProbOperands o) {
  using A = Arithmetic<S>;
  __shared__ A handed_over[kHeld][kThreads];

  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t sample = blockIdx.x, start = sample * o.elements;
  const std::int64_t its = kOwnRows ? sample : 0;
  const A* row = static_cast<const A*>(o.row) + its * kColumns;
  const A a = LoadConstant{}(row + kA), b0 = LoadConstant{}(row + kB0);
  A lanes[kHeld] = {};
  for (std::int64_t i = kHeld * thread; i < o.elements; i += kLanes) {
#pragma unroll
    for (int j = 0; j < kHeld; j += kSize) {
      if (kSize == 1 && i + j >= o.elements) break;
      const auto base = Vector<S, kSize>::from(o.base, start + i + j, Load{});
      const auto v = Vector<V, kSize>::from(o.v, start + i + j, Load{});
      const auto next = Vector<S, kSize>::from(o.next, start + i + j, Load{});
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const A squared = square<A>(a, static_cast<A>(widen(base[k])), b0, static_cast<A>(widen(v[k])),
                                    static_cast<A>(widen(next[k])));
        lanes[j + k] = add(lanes[j + k], squared);
      }
    }
  }
  // Each level has memory of its own, so that one barrier a level is enough.
  for (int width = kThreads / 2; width; width /= 2) {
    if (thread >= width && thread < 2 * width) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) handed_over[j][thread] = lanes[j];
    }
    __syncthreads();
    if (thread < width) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) lanes[j] = add(lanes[j], handed_over[j][thread + width]);
    }
  }
  if (thread != 0) return;
#pragma unroll
  for (int width = kHeld / 2; width; width /= 2) {
#pragma unroll
    for (int j = 0; j < width; ++j) lanes[j] = add(lanes[j], lanes[j + width]);
  }
  const A* density = static_cast<const A*>(o.density) + its * kDensityColumns;
  const A scale = LoadConstant{}(density + kScale), offset = LoadConstant{}(density + kOffset);
  Vector<A, 1>{log_prob(lanes[0], o.elements, scale, offset, kOwnRows)}.to(o.out, sample, Store{});
}

template <class S, class V, bool kOwnRows>
void launch(const LogProbOperands& o, cudaStream_t stream) {
  const bool whole = o.elements % kHeld == 0 && on_boundary<S, kHeld>(o.base) && on_boundary<V, kHeld>(o.v) &&
                     on_boundary<S, kHeld>(o.next);
  void* arguments[] = {const_cast<LogProbOperands*>(&o)};
  launch_blocks(whole ? &step_log_prob_kernel<S, V, kOwnRows, kHeld> : &step_log_prob_kernel<S, V, kOwnRows, 1>,
                o.samples, arguments, stream, "step_log_prob", o.samples * o.elements);
}

}  // namespace

void step_log_prob_cuda(const LogProbOperands& o, Dtype base, Dtype velocity, int device, void* stream) {
  if (o.samples == 0) return;  // an empty grid is an error
  const DeviceGuard guard(device, "step_log_prob");
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const auto launched = [&]<class E>(E) {
    using S = typename E::S;
    using V = typename E::V;
    o.own_rows ? launch<S, V, true>(o, on) : launch<S, V, false>(o, on);
  };
  if (!dispatch_log_prob(base, velocity, launched)) {
    throw std::invalid_argument("step_log_prob: the dtypes do not go together");
  }
}

}  // namespace flowmatch_kernels

// Keyed noise on a CUDA device: one launch, one thread for each counter, of four elements.
//
// Bytes moved per element are the least possible: each is written once. The key of a sample, 24 bytes, is one line that
// all of its threads find in the L1 cache.
//
// Needs nothing of Python or PyTorch, and of CUDA only what tests/host_cuda/cuda_runtime.h doubles.
#include <cuda_runtime.h>

#include "cuda_launch.h"
#include "cuda_memory.h"
#include "keyed_noise_cuda.h"

namespace flowmatch_kernels {
namespace {

// With kFours each counter's elements are all there, and on a boundary of four: then they are one access, or for
// float64 two.
template <class T, bool kFours>
__global__ void __launch_bounds__(kThreads)
    keyed_noise_kernel(const NoiseOperands o, const Divisor by_sample, const std::int64_t counters) {
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= counters) return;
  const std::int64_t sample = by_sample.quotient(thread);
  std::int64_t key[3];
#pragma unroll
  for (int k = 0; k < 3; ++k) key[k] = LoadConstant{}(o.keys + 3 * sample + k);
  const std::int64_t block = thread - sample * ((o.elements + 3) / 4);
  const Counter with = counter(key, o.evaluation, block);
  const Words words = philox(static_cast<std::uint32_t>(block), with.c1, with.c2, with.c3, with.k0, with.k1);
  float z[4];
  normals(words.w[0], words.w[1], z[0], z[1]);
  normals(words.w[2], words.w[3], z[2], z[3]);
  const std::int64_t element = 4 * block, place = sample * o.elements + element;
  if constexpr (kFours) {
    Vector<T, 4> out;
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = To<T>::narrow(z[j]);
    out.to(o.out, place, StoreWhole{});
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (element + j < o.elements) Vector<T, 1>{To<T>::narrow(z[j])}.to(o.out, place + j, Store{});
    }
  }
}

template <class T>
void launch(const NoiseOperands& o, cudaStream_t stream) {
  std::int64_t counters = o.samples * blocks_of(o.elements);
  Divisor by_sample(static_cast<std::uint64_t>(blocks_of(o.elements)));
  void* arguments[] = {const_cast<NoiseOperands*>(&o), &by_sample, &counters};
  const bool fours = o.elements % 4 == 0 && on_boundary<T, 4>(o.out);
  launch_blocks(fours ? &keyed_noise_kernel<T, true> : &keyed_noise_kernel<T, false>, blocks_for(counters), arguments,
                stream, "keyed_noise", o.samples * o.elements);
}

}  // namespace

void keyed_noise_cuda(const NoiseOperands& o, Dtype dtype, int device, void* stream) {
  if (o.samples == 0 || o.elements == 0) return;  // an empty grid is an error
  const DeviceGuard guard(device, "keyed_noise");
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case Dtype::kFloat32:
      return launch<Float32>(o, on);
    case Dtype::kFloat64:
      return launch<Float64>(o, on);
    case Dtype::kBFloat16:
      return launch<BFloat16>(o, on);
    case Dtype::kFloat16:
      return launch<Float16>(o, on);
  }
}

}  // namespace flowmatch_kernels

// The host's side of a launch on CUDA, for every kernel: the grid, errors, and the current device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace flowmatch_kernels {

constexpr int kThreads = 256;  // of a block, in every kernel

// Throws std::runtime_error, with CUDA's own words, where a call that an op made has failed.
inline void check(cudaError_t error, const char* op, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // CUDA keeps it for whoever asks next, who is not to blame
  throw std::runtime_error(std::string(op) + ": " + call + ": " + cudaGetErrorString(error));
}

// Makes `device` current, and the former one when it goes.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    check(cudaGetDevice(&former_), op, "cudaGetDevice");
    if (former_ == device) return;
    check(cudaSetDevice(device), op, "cudaSetDevice");
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

// Blocks for so many threads, at least one.
inline std::int64_t blocks_for(std::int64_t threads) { return (threads - 1) / kThreads + 1; }

// One launch of a kernel, for an op whose state has `numel` elements.
template <class Kernel>
void launch_blocks(Kernel* kernel, std::int64_t blocks, void** arguments, cudaStream_t stream, const char* op,
                   std::int64_t numel) {
  if (blocks > std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument(std::string(op) + ": a state of " + std::to_string(numel) + " elements is too large");
  }
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned int>(blocks)), dim3(kThreads), arguments, 0, stream), op,
        "cudaLaunchKernel");
}

}  // namespace flowmatch_kernels

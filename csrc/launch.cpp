#include "launch.h"

#if defined(FLOWMATCH_KERNELS_CUDA) && !defined(USE_CUDA)
#define USE_CUDA  // shim.h then declares the current stream; a CPU build of torch has the same header
#endif
#ifdef FLOWMATCH_KERNELS_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif
#include <torch/csrc/stable/ops.h>

#include <stdexcept>

#include "fused_step_cpu.h"
#ifdef FLOWMATCH_KERNELS_CUDA
#include "fused_step_cuda.h"
#endif

namespace flowmatch_kernels {

void launch_cpu(const Operands& o, Dtype state, Dtype velocity, bool velocity_rounding) {
  if (!dispatch(state, velocity, velocity_rounding, [](auto) {})) {
    throw std::invalid_argument("fused_step: the velocity's dtype is wider than the state's");
  }
  const auto part = [&](std::int64_t begin, std::int64_t end) {
    fused_step_cpu(o, state, velocity, velocity_rounding, begin, end);
  };
  if (o.numel <= kGrain) {
    part(0, o.numel);
  } else {
    torch::stable::parallel_for(0, o.numel, kGrain, part);
  }
}

#ifdef FLOWMATCH_KERNELS_CUDA
void launch_cuda(const Operands& o, Dtype state, Dtype velocity, bool velocity_rounding, int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  fused_step_cuda(o, state, velocity, velocity_rounding, device, stream);
}
#endif

}  // namespace flowmatch_kernels

#include "launch.h"

#include <torch/csrc/stable/ops.h>

#include <stdexcept>

#include "fused_step_cpu.h"

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

}  // namespace flowmatch_kernels

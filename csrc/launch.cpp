#include "launch.h"

#include <torch/csrc/stable/ops.h>

#include <stdexcept>

#include "fused_step_cpu.h"

namespace flowmatch_kernels {

const char* name_of(Dtype dtype) {
  constexpr const char* kNames[] = {"torch.float32", "torch.float64", "torch.bfloat16", "torch.float16"};
  return kNames[static_cast<int>(dtype)];
}

std::optional<std::string> mismatch(Dtypes dtypes, Rounding rounding, bool sum_first) {
  if (dispatch(dtypes, rounding, sum_first, [](auto) {})) return std::nullopt;
  const std::string base = name_of(dtypes.base), velocity = name_of(dtypes.velocity), out = name_of(dtypes.out);
  if (dtypes.out != dtypes.base && dtypes.out != dtypes.velocity) {
    return "out must be " + base + ", as base, or " + velocity + ", as v; got " + out;
  }
  if (dtypes.out == dtypes.base && !dispatch(dtypes, rounding, false, [](auto) {})) {
    return "v is " + velocity + ", wider than the state's " + base + ": cast v, or choose a wider state";
  }
  if (sum_first) return "sum_first needs base, v and out of one dtype, got " + base + ", " + velocity + " and " + out;
  if (dtypes.base == Dtype::kFloat64 || dtypes.velocity == Dtype::kFloat64) {
    return "out must have base's dtype where base or v is torch.float64; got " + out;
  }
  return "out of v's dtype needs rounding 1 or 2, got 0";
}

void launch_cpu(const Operands& o, Dtypes dtypes) {
  if (const auto found = mismatch(dtypes, o.rounding, o.sum_first)) {
    throw std::invalid_argument("fused_step: " + *found);
  }
  const auto part = [&](std::int64_t begin, std::int64_t end) { fused_step_cpu(o, dtypes, begin, end); };
  if (o.numel <= grain(o)) {
    part(0, o.numel);
  } else {
    torch::stable::parallel_for(0, o.numel, grain(o), part);
  }
}

}  // namespace flowmatch_kernels

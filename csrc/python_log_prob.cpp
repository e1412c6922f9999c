#include "python_log_prob.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <stdexcept>

#include "instruction_set.h"
#include "launch.h"
#include "python_tensor.h"
#include "step_log_prob_cpu.h"

namespace flowmatch_kernels {
namespace {

// By addresses, unchecked but for the dtypes: flowmatch_kernels.ops.native.step_log_prob_ has what checks them.
LogProbOperands operands(std::uintptr_t out, std::uintptr_t base, std::uintptr_t v, std::uintptr_t next,
                         std::uintptr_t row, std::uintptr_t density, std::int64_t samples, std::int64_t elements,
                         bool own_rows) {
  return {.out = reinterpret_cast<void*>(out),
          .base = reinterpret_cast<const void*>(base),
          .v = reinterpret_cast<const void*>(v),
          .next = reinterpret_cast<const void*>(next),
          .row = reinterpret_cast<const void*>(row),
          .density = reinterpret_cast<const void*>(density),
          .samples = samples,
          .elements = elements,
          .own_rows = own_rows};
}

void step_log_prob(std::uintptr_t out, std::uintptr_t base, std::uintptr_t v, std::uintptr_t next, std::uintptr_t row,
                   std::uintptr_t density, int base_dtype, int velocity_dtype, std::int64_t samples,
                   std::int64_t elements, bool own_rows, int level) {
  const pybind11::gil_scoped_release released;
  const LogProbOperands o = operands(out, base, v, next, row, density, samples, elements, own_rows);
  const auto state = static_cast<Dtype>(base_dtype), velocity = static_cast<Dtype>(velocity_dtype);
  if (!dispatch_log_prob(state, velocity, [](auto) {})) {
    throw std::invalid_argument("step_log_prob: the dtypes do not go together");
  }
  const auto part = [&](std::int64_t begin, std::int64_t end) {
    step_log_prob_cpu(o, state, velocity, begin, end, level);
  };
  const std::int64_t grain = std::max<std::int64_t>(1, kGrain / elements);
  if (samples <= grain) {
    part(0, samples);
  } else {
    torch::stable::parallel_for(0, samples, grain, part);
  }
}

void step_log_prob_on_cuda(const pybind11::object& launch, int device, std::uintptr_t out, std::uintptr_t base,
                           std::uintptr_t v, std::uintptr_t next, std::uintptr_t row, std::uintptr_t density,
                           int base_dtype, int velocity_dtype, std::int64_t samples, std::int64_t elements,
                           bool own_rows) {
  const auto launched = function_in<LaunchLogProbCuda>(launch, kLaunchLogProbCudaCapsule);
  launched(operands(out, base, v, next, row, density, samples, elements, own_rows), static_cast<Dtype>(base_dtype),
           static_cast<Dtype>(velocity_dtype), device);
}

}  // namespace

void add_step_log_prob(pybind11::module_& m) {
  using pybind11::arg;
  m.def("step_log_prob", &step_log_prob, arg("out"), arg("base"), arg("v"), arg("next"), arg("row"), arg("density"),
        arg("base_dtype"), arg("velocity_dtype"), arg("samples"), arg("elements"), arg("own_rows"),
        arg("level") = kWidest,
        "Writes log-probabilities to out, [samples]; `level` bounds the instruction set: 0 SSE2, 1 AVX2, 2 AVX-512.");
  m.def("step_log_prob_cuda", &step_log_prob_on_cuda, arg("launch"), arg("device"), arg("out"), arg("base"), arg("v"),
        arg("next"), arg("row"), arg("density"), arg("base_dtype"), arg("velocity_dtype"), arg("samples"),
        arg("elements"), arg("own_rows"),
        "The same on a CUDA device's current stream, by flowmatch_kernels._C_cuda.launch_log_prob.");
}

}  // namespace flowmatch_kernels

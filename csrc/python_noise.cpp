#include "python_noise.h"

#include <torch/csrc/stable/ops.h>

#include "keyed_noise_cpu.h"
#include "launch.h"
#include "python_tensor.h"

namespace flowmatch_kernels {
namespace {

// By addresses, unchecked: flowmatch_kernels.ops.native.keyed_noise_ has what checks them.
NoiseOperands operands(std::uintptr_t out, std::uintptr_t keys, std::int64_t samples, std::int64_t elements,
                       std::int64_t evaluation) {
  return {.out = reinterpret_cast<void*>(out),
          .keys = reinterpret_cast<const std::int64_t*>(keys),
          .samples = samples,
          .elements = elements,
          .evaluation = evaluation};
}

void keyed_noise(std::uintptr_t out, int dtype, std::uintptr_t keys, std::int64_t samples, std::int64_t elements,
                 std::int64_t evaluation, int level) {
  const pybind11::gil_scoped_release released;
  const NoiseOperands o = operands(out, keys, samples, elements, evaluation);
  const std::int64_t counters = samples * blocks_of(elements);
  const auto part = [&](std::int64_t begin, std::int64_t end) {
    keyed_noise_cpu(o, static_cast<Dtype>(dtype), begin, end, level);
  };
  if (counters <= kGrainCounters) {
    part(0, counters);
  } else {
    torch::stable::parallel_for(0, counters, kGrainCounters, part);
  }
}

void keyed_noise_on_cuda(const pybind11::object& launch, int device, std::uintptr_t out, int dtype, std::uintptr_t keys,
                         std::int64_t samples, std::int64_t elements, std::int64_t evaluation) {
  const auto launched = function_in<LaunchNoiseCuda>(launch, kLaunchNoiseCudaCapsule);
  launched(operands(out, keys, samples, elements, evaluation), static_cast<Dtype>(dtype), device);
}

}  // namespace

void add_keyed_noise(pybind11::module_& m) {
  using pybind11::arg;
  m.def("keyed_noise", &keyed_noise, arg("out"), arg("dtype"), arg("keys"), arg("samples"), arg("elements"),
        arg("evaluation"), arg("level") = kWidest,
        "Writes normals to out, [samples, elements]; `level` bounds the instruction set: 0 SSE2, 1 AVX2, 2 AVX-512.");
  m.def("keyed_noise_cuda", &keyed_noise_on_cuda, arg("launch"), arg("device"), arg("out"), arg("dtype"), arg("keys"),
        arg("samples"), arg("elements"), arg("evaluation"),
        "The same on a CUDA device's current stream, by flowmatch_kernels._C_cuda.launch_noise.");
}

}  // namespace flowmatch_kernels

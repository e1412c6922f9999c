// The CUDA kernels of keyed noise and step_log_prob, compiled for the host, with the doubles of cuda_runtime.h.
#include "double_bindings.h"
#include "keyed_noise_cuda.cu"
#include "step_log_prob_cuda.cu"

namespace py = pybind11;

namespace {

template <class T = void>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// As flowmatch_kernels._C.keyed_noise_cuda, with the stream told.
void keyed_noise_cuda(std::uintptr_t out, int dtype, std::uintptr_t keys, std::int64_t samples, std::int64_t elements,
                      std::int64_t evaluation, int device, std::uintptr_t stream) {
  using namespace flowmatch_kernels;
  const NoiseOperands o{.out = pointer(out),
                        .keys = pointer<const std::int64_t>(keys),
                        .samples = samples,
                        .elements = elements,
                        .evaluation = evaluation};
  flowmatch_kernels::keyed_noise_cuda(o, static_cast<Dtype>(dtype), device, pointer(stream));
}

// As flowmatch_kernels._C.step_log_prob_cuda, with the stream told.
void step_log_prob_cuda(std::uintptr_t out, std::uintptr_t base, std::uintptr_t v, std::uintptr_t next,
                        std::uintptr_t row, std::uintptr_t density, int base_dtype, int velocity_dtype,
                        std::int64_t samples, std::int64_t elements, bool own_rows, int device, std::uintptr_t stream) {
  using namespace flowmatch_kernels;
  const LogProbOperands o{.out = pointer(out),
                          .base = pointer(base),
                          .v = pointer(v),
                          .next = pointer(next),
                          .row = pointer(row),
                          .density = pointer(density),
                          .samples = samples,
                          .elements = elements,
                          .own_rows = own_rows};
  flowmatch_kernels::step_log_prob_cuda(o, static_cast<Dtype>(base_dtype), static_cast<Dtype>(velocity_dtype), device,
                                        pointer(stream));
}

}  // namespace

PYBIND11_MODULE(_host_cuda, m) {
  using py::arg;
  m.def("keyed_noise_cuda", &keyed_noise_cuda, arg("out"), arg("dtype"), arg("keys"), arg("samples"), arg("elements"),
        arg("evaluation"), arg("device") = 0, arg("stream") = 0);
  m.def("step_log_prob_cuda", &step_log_prob_cuda, arg("out"), arg("base"), arg("v"), arg("next"), arg("row"),
        arg("density"), arg("base_dtype"), arg("velocity_dtype"), arg("samples"), arg("elements"),
        arg("own_rows") = false, arg("device") = 0, arg("stream") = 0);
  host_cuda::add_double(m);
}

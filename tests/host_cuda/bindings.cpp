// flowmatch_kernels' CUDA kernel and launcher, compiled for the host, with the doubles of cuda_runtime.h.
#include "double_bindings.h"
#include "fused_step_cuda.cu"

namespace py = pybind11;

namespace {

// As flowmatch_kernels._C.fused_step_cuda, with the stream told.
void fused_step_cuda(std::uintptr_t out, std::uintptr_t base, std::uintptr_t v, std::uintptr_t u, std::uintptr_t h1,
                     std::uintptr_t h2, std::uintptr_t h3, std::uintptr_t coefficients, std::int64_t row,
                     int base_dtype, int velocity_dtype, int out_dtype, int rounding, int guidance, bool sum_first,
                     std::uintptr_t trajectory, std::int64_t slots, std::int64_t slot, std::uintptr_t history, std::uintptr_t strength,
                     std::int64_t numel, std::int64_t sample, int device, std::uintptr_t stream, std::uint32_t rows, bool keyed) {
  using namespace flowmatch_kernels;
  const auto pointer = [](std::uintptr_t address) { return reinterpret_cast<void*>(address); };
  const Dtypes dtypes{static_cast<Dtype>(base_dtype), static_cast<Dtype>(velocity_dtype),
                      static_cast<Dtype>(out_dtype)};
  const std::int64_t row_bytes = kColumns * size_of(arithmetic_of(dtypes.base));
  const Operands o{.out = pointer(out),
                   .base = pointer(base),
                   .v = pointer(v),
                   .u = pointer(u),
                   .h = {pointer(h1), pointer(h2), pointer(h3)},
                   .row = pointer(coefficients + row * row_bytes),
                   .trajectory = pointer(trajectory),
                   .history = pointer(history),
                   .numel = numel,
                   .sample = sample,
                   .slots = slots,
                   .slot = slot,
                   .guidance = static_cast<Guidance>(guidance),
                   .rounding = static_cast<Rounding>(rounding),
                   .sum_first = sum_first,
                   .keyed = keyed,
                   .rows = rows,
                   .strength = pointer(strength)};
  flowmatch_kernels::fused_step_cuda(o, dtypes, device, pointer(stream));
}

}  // namespace

PYBIND11_MODULE(_host_cuda, m) {
  m.def("fused_step_cuda", &fused_step_cuda, py::arg("out"), py::arg("base"), py::arg("v"), py::arg("u"), py::arg("h1"),
        py::arg("h2"), py::arg("h3"), py::arg("coefficients"), py::arg("row"), py::arg("base_dtype"), py::arg("velocity_dtype"),
        py::arg("out_dtype"), py::arg("rounding"), py::arg("guidance"), py::arg("sum_first"), py::arg("trajectory"), py::arg("slots"), py::arg("slot"),
        py::arg("history"), py::arg("strength"), py::arg("numel"), py::arg("sample"), py::arg("device"), py::arg("stream") = 0, py::arg("rows") = 0, py::arg("keyed") = false);
  m.def("quotient", [](std::int64_t i, std::int64_t divisor) {
    return flowmatch_kernels::Divisor(static_cast<std::uint64_t>(divisor)).quotient(i);
  });
  // One load of 16 bytes, as the kernel's.
  m.def("load_word", [](std::uintptr_t address) { __ldcs(reinterpret_cast<const uint4*>(address)); });

  host_cuda::add_double(m);
}

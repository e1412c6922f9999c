// The extension module flowmatch_kernels._C.
//
// Two doors to the same kernels: the registered ops, on LibTorch's stable ABI (one build for every torch >= 2.10),
// which check their operands; and direct calls for the loop: direct_cpu.cpp, and for a GPU, through pybind11, one with
// raw pointers.
#if defined(FLOWMATCH_KERNELS_CUDA) && !defined(USE_CUDA)
#define USE_CUDA  // shim.h then declares the current stream; a CPU build of torch has the same header
#endif
#include <pybind11/pybind11.h>
#ifdef FLOWMATCH_KERNELS_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <string>

#include "direct_cpu.h"
#ifdef FLOWMATCH_KERNELS_CUDA
#include "fused_step_cuda.h"
#endif

namespace flowmatch_kernels {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#ifdef FLOWMATCH_KERNELS_CUDA
void launch_on_current_stream(const Operands& o, Dtype state, Dtype velocity, bool velocity_rounding, int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  fused_step_cuda(o, state, velocity, velocity_rounding, device, stream);
}
#endif

// ---- the registered ops ----

Dtype dtype_of(const Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

bool same_shape(const Tensor& x, const Tensor& y) {
  if (x.dim() != y.dim()) return false;
  for (std::int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) != y.size(d)) return false;
  }
  return true;
}

void check(const Tensor& tensor, const char* name, const Tensor& base, Dtype dtype) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on base's device, the CPU");
  STD_TORCH_CHECK(dtype_of(tensor, name) == dtype, name, " has the wrong dtype for this state");
  STD_TORCH_CHECK(same_shape(tensor, base), name, " must have base's shape");
}

void check_contiguous(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

void* written(const OptionalTensor& tensor) { return tensor ? tensor->mutable_data_ptr() : nullptr; }

void fused_step_(Tensor out, Tensor base, Tensor v, OptionalTensor u, OptionalTensor h1, OptionalTensor h2,
                 OptionalTensor h3, Tensor coefficients, std::int64_t row, bool velocity_rounding,
                 std::int64_t guidance, OptionalTensor trajectory, std::int64_t slot, OptionalTensor history) {
  const Dtype state = dtype_of(base, "base"), velocity = dtype_of(v, "v");
  const Dtype arithmetic = state == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  check(base, "base", base, state);
  check_contiguous(base, "base");
  check(out, "out", base, state);
  check_contiguous(out, "out");
  check(v, "v", base, velocity);
  STD_TORCH_CHECK(dispatch(state, velocity, false, [](auto) {}),
                  "v is wider than the state: cast v, or choose a wider state");
  v = torch::stable::contiguous(v);
  if (u) {
    check(*u, "u", base, velocity);
    u = torch::stable::contiguous(*u);
  }
  STD_TORCH_CHECK(!(h2 && !h1) && !(h3 && !h2), "history terms fill up from h1: h2 needs h1, h3 needs h2");
  STD_TORCH_CHECK(guidance >= 0 && guidance <= 2, "guidance must be 0, 1 or 2, got ", guidance);
  const std::pair<const OptionalTensor*, const char*> histories[] = {
      {&h1, "h1"}, {&h2, "h2"}, {&h3, "h3"}, {&history, "history"}};
  for (const auto& [tensor, name] : histories) {
    if (!*tensor) continue;
    check(**tensor, name, base, arithmetic);
    check_contiguous(**tensor, name);
  }
  STD_TORCH_CHECK(coefficients.is_cpu(), "coefficients must be on base's device, the CPU");
  STD_TORCH_CHECK(dtype_of(coefficients, "coefficients") == arithmetic,
                  "coefficients must have the arithmetic dtype: float64 for a float64 state, else float32");
  STD_TORCH_CHECK(coefficients.dim() == 2 && coefficients.size(1) == kColumns, "coefficients must be [rows, 8]");
  check_contiguous(coefficients, "coefficients");
  STD_TORCH_CHECK(row >= 0 && row < coefficients.size(0), "row must be in [0, ", coefficients.size(0), "), got ", row);
  std::int64_t slots = 1;
  if (trajectory) {
    STD_TORCH_CHECK(trajectory->is_cpu(), "trajectory must be on base's device, the CPU");
    STD_TORCH_CHECK(dtype_of(*trajectory, "trajectory") == state, "trajectory must have the state's dtype");
    bool fits = base.dim() > 0 && trajectory->dim() == base.dim() + 1 && trajectory->size(0) == base.size(0);
    for (std::int64_t d = 1; fits && d < base.dim(); ++d) fits = trajectory->size(d + 1) == base.size(d);
    STD_TORCH_CHECK(fits, "trajectory must be [B, slots, *x_dims]");
    check_contiguous(*trajectory, "trajectory");
    slots = trajectory->size(1);
    STD_TORCH_CHECK(slot >= 0 && slot < slots, "slot must be in [0, ", slots, "), got ", slot);
  }
  if (base.numel() == 0) return;

  const auto read = [](const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; };
  const std::int64_t row_bytes = kColumns * (arithmetic == Dtype::kFloat64 ? 8 : 4);
  run_cpu(Operands{.out = out.mutable_data_ptr(),
                   .base = base.const_data_ptr(),
                   .v = v.const_data_ptr(),
                   .u = read(u),
                   .h = {read(h1), read(h2), read(h3)},
                   .row = static_cast<const char*>(coefficients.const_data_ptr()) + row * row_bytes,
                   .trajectory = written(trajectory),
                   .history = written(history),
                   .numel = base.numel(),
                   .sample = base.dim() > 0 ? base.numel() / base.size(0) : 1,
                   .slots = slots,
                   .slot = slot,
                   .guidance = static_cast<Guidance>(guidance)},
          state, velocity, velocity_rounding);
}

Tensor fused_step(Tensor base, Tensor v, OptionalTensor u, OptionalTensor h1, OptionalTensor h2, OptionalTensor h3,
                  Tensor coefficients, std::int64_t row, bool velocity_rounding, std::int64_t guidance) {
  Tensor out = torch::stable::empty_like(base);
  fused_step_(out, base, v, u, h1, h2, h3, coefficients, row, velocity_rounding, guidance, std::nullopt, 0,
              std::nullopt);
  return out;
}

// ---- memory ----

// Asks the system for huge pages for memory not yet touched: filling 184 MB of fresh memory then takes a quarter of the
// time. Only a wish: where it cannot be had, nothing changes.
void advise_huge_pages(std::uintptr_t address, std::size_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t kHuge = std::uintptr_t{1} << 21;
  const std::uintptr_t begin = (address + kHuge - 1) & ~(kHuge - 1), end = (address + bytes) & ~(kHuge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(address + bytes);
#endif
}

// ---- the direct call on a GPU ----

#ifdef FLOWMATCH_KERNELS_CUDA
// Integers are addresses; 0 stands for an operand that is absent.
void fused_step_cuda_python(std::uintptr_t out, std::uintptr_t base, std::uintptr_t v, std::uintptr_t u,
                            std::uintptr_t h1, std::uintptr_t h2, std::uintptr_t h3, std::uintptr_t coefficients,
                            std::int64_t row, int state, int velocity, bool velocity_rounding, int guidance,
                            std::uintptr_t trajectory, std::int64_t slots, std::int64_t slot, std::uintptr_t history,
                            std::int64_t numel, std::int64_t sample, int device) {
  const auto pointer = [](std::uintptr_t address) { return reinterpret_cast<void*>(address); };
  const Dtype state_dtype = static_cast<Dtype>(state);
  const std::int64_t row_bytes = kColumns * (state_dtype == Dtype::kFloat64 ? 8 : 4);
  launch_on_current_stream(Operands{.out = pointer(out),
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
                                    .guidance = static_cast<Guidance>(guidance)},
                           state_dtype, static_cast<Dtype>(velocity), velocity_rounding, device);
}
#endif

}  // namespace
}  // namespace flowmatch_kernels

STABLE_TORCH_LIBRARY_IMPL(flowmatch_kernels, CPU, m) {
  m.impl("fused_step", TORCH_BOX(&flowmatch_kernels::fused_step));
  m.impl("fused_step_", TORCH_BOX(&flowmatch_kernels::fused_step_));
}

PYBIND11_MODULE(_C, m) {
  using namespace flowmatch_kernels;
  m.def("instruction_set", &instruction_set, "Name of the instruction set that the cpu backend uses here.");
  m.def("advise_huge_pages", &advise_huge_pages, pybind11::arg("address"), pybind11::arg("bytes"),
        "Asks for huge pages for fresh memory.");
  add_direct_cpu(m);
#ifdef FLOWMATCH_KERNELS_CUDA
  m.attr("cuda_archs") = FLOWMATCH_KERNELS_CUDA;
  m.def("fused_step_cuda", &fused_step_cuda_python,
        "fused_step on a CUDA device's current stream; addresses of contiguous tensors, 0 where absent. Nothing is "
        "checked.");
#endif
}

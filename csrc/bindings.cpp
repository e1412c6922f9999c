// The extension module flowmatch_kernels._C.
//
// Two doors to the same kernels: the registered ops, on LibTorch's stable ABI (one build for every torch >= 2.10),
// which check their operands; and direct calls for the loop, which do not: python_operands.cpp, one step; row.cpp and
// tensor_row.cpp, a whole row of a table.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <string>
#include <utility>

#include "fused_step_cpu.h"
#include "host_pool.h"
#include "launch.h"
#include "overlap.h"
#include "python_log_prob.h"
#include "python_noise.h"
#include "python_operands.h"
#include "python_tensor.h"
#include "row.h"

namespace flowmatch_kernels {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- the registered ops ----

// Which reach Python as what they are, through torch's dispatcher too: std::runtime_errors that pybind11 knows.
using TypeError = pybind11::type_error;
using ValueError = pybind11::value_error;

template <class Error, class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

std::optional<Dtype> dtype_of(const Tensor& tensor) {
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
      return std::nullopt;
  }
}

std::string dtype_name(const Tensor& tensor) {
  const std::optional<Dtype> dtype = dtype_of(tensor);
  return dtype ? name_of(*dtype) : torch::headeronly::toString(tensor.scalar_type());
}

Dtype dtype_of(const Tensor& tensor, const char* name) {
  const std::optional<Dtype> dtype = dtype_of(tensor);
  if (!dtype) refuse<TypeError>(name, " must be float32, float64, bfloat16 or float16, got ", dtype_name(tensor));
  return *dtype;
}

std::string list(const torch::headeronly::IntHeaderOnlyArrayRef& sizes) {
  std::string text = "[";
  for (const std::int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

bool same_shape(const Tensor& x, const Tensor& y) {
  if (x.dim() != y.dim()) return false;
  for (std::int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) != y.size(d)) return false;
  }
  return true;
}

void check_device(const Tensor& tensor, const char* name) {
  if (!tensor.is_cpu()) {
    refuse<ValueError>(name, " must be on base's device cpu, got ", tensor.is_cuda() ? "cuda" : "another");
  }
}

void check_dtype(const Tensor& tensor, const char* name, Dtype dtype) {
  if (dtype_of(tensor, name) != dtype) {
    refuse<TypeError>(name, " must be ", name_of(dtype), ", got ", dtype_name(tensor));
  }
}

void check(const Tensor& tensor, const char* name, const Tensor& base, Dtype dtype) {
  check_device(tensor, name);
  check_dtype(tensor, name, dtype);
  if (!same_shape(tensor, base)) {
    refuse<ValueError>(name, " must have base's shape ", list(base.sizes()), ", got ", list(tensor.sizes()));
  }
}

void check_contiguous(const Tensor& tensor, const char* name) {
  if (!tensor.is_contiguous()) {
    refuse<ValueError>(name, " must be contiguous, got strides ", list(tensor.strides()));
  }
}

void* written(const OptionalTensor& tensor) { return tensor ? tensor->mutable_data_ptr() : nullptr; }

void fused_step_(Tensor out, Tensor base, Tensor v, OptionalTensor u, OptionalTensor h1, OptionalTensor h2,
                 OptionalTensor h3, Tensor coefficients, std::int64_t row, std::int64_t rounding, std::int64_t guidance,
                 bool sum_first, OptionalTensor strength, OptionalTensor trajectory, std::int64_t slot,
                 OptionalTensor history) {
  const Dtypes dtypes{dtype_of(base, "base"), dtype_of(v, "v"), dtype_of(out, "out")};
  const Dtype velocity = dtypes.velocity, arithmetic = arithmetic_of(dtypes.base);
  check(base, "base", base, dtypes.base);
  check_contiguous(base, "base");
  if (rounding < 0 || rounding > 2) refuse<ValueError>("rounding must be 0, 1 or 2, got ", rounding);
  const auto rounds = static_cast<Rounding>(rounding);
  if (const auto found = mismatch(dtypes, rounds, sum_first)) refuse<TypeError>(*found);
  check(out, "out", base, dtypes.out);
  check_contiguous(out, "out");
  check(v, "v", base, velocity);
  v = torch::stable::contiguous(v);
  if (u) {
    check(*u, "u", base, velocity);
    u = torch::stable::contiguous(*u);
  }
  if (strength && (sum_first || dtypes.out != dtypes.base)) {
    refuse<ValueError>("strength needs out of base's dtype ", name_of(dtypes.base), " and no sum_first");
  }
  if ((h2 && !h1) || (h3 && !h2)) {
    refuse<ValueError>("history terms fill up from h1: ", h3 && !h2 ? "h3 needs h2" : "h2 needs h1");
  }
  if (guidance < 0 || guidance > 2) refuse<ValueError>("guidance must be 0, 1 or 2, got ", guidance);
  const bool keyed = h1 && h1->scalar_type() == torch::headeronly::ScalarType::Long;
  if (keyed) {
    if (sum_first || dtypes.out != dtypes.base) {
      refuse<ValueError>("h1 of keys needs out of base's dtype ", name_of(dtypes.base), " and no sum_first");
    }
    if (base.dim() == 0 || h1->dim() != 2 || h1->size(0) != base.size(0) || h1->size(1) != 3 || !h1->is_contiguous()) {
      refuse<ValueError>("h1 of keys must be contiguous, [B, 3] for a state ", list(base.sizes()), ", got ",
                         list(h1->sizes()));
    }
    check_device(*h1, "h1");
  }
  const std::pair<const OptionalTensor*, const char*> histories[] = {
      {&h1, "h1"}, {&h2, "h2"}, {&h3, "h3"}, {&history, "history"}};
  for (const auto& [tensor, name] : histories) {
    if (!*tensor || (keyed && tensor == &h1)) continue;
    check(**tensor, name, base, arithmetic);
    check_contiguous(**tensor, name);
  }
  if (strength) {
    check(*strength, "strength", base, dtypes.base);
    check_contiguous(*strength, "strength");
  }
  check_device(coefficients, "coefficients");
  check_dtype(coefficients, "coefficients", arithmetic);
  const bool own_rows = coefficients.dim() == 3;
  if ((coefficients.dim() != 2 && !own_rows) || coefficients.size(-1) != kColumns || !coefficients.is_contiguous()) {
    refuse<ValueError>("coefficients must be contiguous, [rows, 8] or [rows, R, 8], got ", list(coefficients.sizes()));
  }
  const std::int64_t R = own_rows ? coefficients.size(1) : 1;
  std::optional<std::uint32_t> rows(0);
  if (own_rows) {
    rows = rows_of_sample(base.sizes(), base.dim(), R);
    if (!rows) {
      refuse<ValueError>("coefficients [rows, R, 8] need R to be the product of the first sizes of base's shape ",
                         list(base.sizes()), ", got ", list(coefficients.sizes()));
    }
    if (sum_first) refuse<ValueError>("sum_first needs coefficients [rows, 8], got ", list(coefficients.sizes()));
  }
  if (row < 0 || row >= coefficients.size(0)) {
    refuse<ValueError>("row must be in [0, ", coefficients.size(0), "), got ", row);
  }
  std::int64_t slots = 1;
  if (trajectory) {
    check_device(*trajectory, "trajectory");
    check_dtype(*trajectory, "trajectory", dtypes.out);
    bool fits = base.dim() > 0 && trajectory->dim() == base.dim() + 1 && trajectory->size(0) == base.size(0);
    for (std::int64_t d = 1; fits && d < base.dim(); ++d) fits = trajectory->size(d + 1) == base.size(d);
    if (!fits || !trajectory->is_contiguous()) {
      refuse<ValueError>("trajectory must be contiguous, [B, slots, *x_dims] for a state ", list(base.sizes()),
                         ", got ", list(trajectory->sizes()));
    }
    slots = trajectory->size(1);
    if (slot < 0 || slot >= slots) refuse<ValueError>("slot must be in [0, ", slots, "), got ", slot);
  }
  if (base.numel() == 0) return;

  const auto read = [](const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; };
  const std::int64_t row_bytes = kColumns * size_of(arithmetic);
  const Operands o{.out = out.mutable_data_ptr(),
                   .base = base.const_data_ptr(),
                   .v = v.const_data_ptr(),
                   .u = read(u),
                   .h = {read(h1), read(h2), read(h3)},
                   .row = static_cast<const char*>(coefficients.const_data_ptr()) + row * R * row_bytes,
                   .trajectory = written(trajectory),
                   .history = written(history),
                   .numel = base.numel(),
                   .sample = base.dim() > 0 ? base.numel() / base.size(0) : 1,
                   .slots = slots,
                   .slot = slot,
                   .guidance = static_cast<Guidance>(guidance),
                   .rounding = rounds,
                   .sum_first = sum_first,
                   .keyed = keyed,
                   .rows = *rows,
                   .strength = read(strength)};
  if (const auto found = overlap(o, dtypes, coefficients.const_data_ptr(), coefficients.size(0) * R)) {
    refuse<ValueError>(*found);
  }
  launch_cpu(o, dtypes);
}

Tensor fused_step(Tensor base, Tensor v, OptionalTensor u, OptionalTensor h1, OptionalTensor h2, OptionalTensor h3,
                  Tensor coefficients, std::int64_t row, std::int64_t rounding, std::int64_t guidance, bool sum_first,
                  OptionalTensor strength) {
  Tensor out = torch::stable::empty_like(base);
  fused_step_(out, base, v, u, h1, h2, h3, coefficients, row, rounding, guidance, sum_first, strength, std::nullopt, 0,
              std::nullopt);
  return out;
}

}  // namespace
}  // namespace flowmatch_kernels

STABLE_TORCH_LIBRARY_IMPL(flowmatch_kernels, CPU, m) {
  m.impl("fused_step", TORCH_BOX(&flowmatch_kernels::fused_step));
  m.impl("fused_step_", TORCH_BOX(&flowmatch_kernels::fused_step_));
}

PYBIND11_MODULE(_C, m) {
  using namespace flowmatch_kernels;
  find_torch(pybind11::module_::import("torch"));
  m.def("instruction_set", &instruction_set, "Name of the instruction set that the cpu backend uses here.");
  m.def("empty_pool", &empty_pool, "Frees the host memory that is kept for reuse.");
  m.def("set_pool_limit", &set_pool_limit, pybind11::arg("bytes"), "How much host memory is kept for reuse.");
  m.def(
      "pool_sizes",
      [] {
        const PoolSizes sizes = pool_sizes();
        return pybind11::make_tuple(sizes.limit, sizes.idle, sizes.in_use);
      },
      "Host memory, in bytes: the most that is kept for reuse, what is kept now, and what is in use.");
  add_fused_step(m);
  add_keyed_noise(m);
  add_step_log_prob(m);
  add_rows(m);
  add_tensor_rows(m);
#ifdef FLOWMATCH_KERNELS_CUDA
  m.attr("cuda_archs") = FLOWMATCH_KERNELS_CUDA;  // what flowmatch_kernels._C_cuda was built for, and with
  m.attr("cuda_version") = FLOWMATCH_KERNELS_CUDA_VERSION;
#endif
}

// The extension module flowmatch_kernels._C.
//
// Two doors to the same kernels: the registered ops, on LibTorch's stable ABI (one build for every torch >= 2.10),
// which check their operands; and, through pybind11, a direct call with raw pointers for the loop, which has checked
// them.
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

#include "fused_step_cpu.h"
#ifdef FLOWMATCH_KERNELS_CUDA
#include "fused_step_cuda.h"
#endif

namespace flowmatch_kernels {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Elements below which a second thread costs more than it saves.
constexpr std::int64_t kGrain = 32768;

void run_cpu(const Operands& o, Dtype state, Dtype velocity, bool velocity_rounding) {
  STD_TORCH_CHECK(dispatch(state, velocity, velocity_rounding, [](auto) {}),
                  "the velocity's dtype is wider than the state's");
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
                 OptionalTensor trajectory, std::int64_t slot, OptionalTensor history) {
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
                   .slot = slot},
          state, velocity, velocity_rounding);
}

Tensor fused_step(Tensor base, Tensor v, OptionalTensor u, OptionalTensor h1, OptionalTensor h2, OptionalTensor h3,
                  Tensor coefficients, std::int64_t row, bool velocity_rounding) {
  Tensor out = torch::stable::empty_like(base);
  fused_step_(out, base, v, u, h1, h2, h3, coefficients, row, velocity_rounding, std::nullopt, 0, std::nullopt);
  return out;
}

// ---- the direct call on the CPU ----

// Asks tensors for what it needs, as Python would, at a third of the time of packing 19 numbers in Python.

struct PythonError {};  // Python's error indicator is set

class Object {  // a new reference
 public:
  explicit Object(PyObject* object) : object_(object) {
    if (!object) throw PythonError();
  }
  ~Object() { Py_DECREF(object_); }
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

PyObject* interned(const char* name) {
  PyObject* string = PyUnicode_InternFromString(name);
  if (!string) throw PythonError();
  return string;
}

std::int64_t integer(PyObject* object) {
  const long long value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}

bool truth(PyObject* object) {
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw PythonError();
  return value == 1;
}

// Of an operand: its memory, null where it is None.
void* memory(PyObject* tensor) {
  static PyObject* const data_ptr = interned("data_ptr");
  if (tensor == Py_None) return nullptr;
  const Object address(PyObject_CallMethodNoArgs(tensor, data_ptr));
  void* pointer = PyLong_AsVoidPtr(address.get());
  if (!pointer && PyErr_Occurred()) throw PythonError();
  return pointer;
}

std::int64_t size(PyObject* tensor, Py_ssize_t dimension) {
  static PyObject* const shape = interned("shape");
  const Object sizes(PyObject_GetAttr(tensor, shape));
  const Object entry(PySequence_GetItem(sizes.get(), dimension));
  return integer(entry.get());
}

bool is(PyObject* tensor, PyObject* method) {
  const Object answer(PyObject_CallMethodNoArgs(tensor, method));
  return answer.get() == Py_True;
}

// torch.float32, ... in the order of Dtype. Filled when the module is imported, never released.
PyObject* torch_dtypes[4];

Dtype python_dtype(PyObject* tensor) {
  static PyObject* const name = interned("dtype");
  const Object dtype(PyObject_GetAttr(tensor, name));
  for (int k = 0; k < 4; ++k) {
    if (dtype.get() == torch_dtypes[k]) return static_cast<Dtype>(k);
  }
  PyErr_SetString(PyExc_TypeError, "fused_step_: an operand is not float32, float64, bfloat16 or float16");
  throw PythonError();
}

// A velocity as contiguous memory that holds its values, by flowmatch_kernels.ops.fused_step.dense where it is not.
PyObject* dense(PyObject* v) {
  static PyObject* const is_contiguous = interned("is_contiguous");
  static PyObject* const is_neg = interned("is_neg");
  static PyObject* const is_zerotensor = interned("_is_zerotensor");
  if (is(v, is_contiguous) && !is(v, is_neg) && !is(v, is_zerotensor)) return Py_NewRef(v);
  const pybind11::module_ contract = pybind11::module_::import("flowmatch_kernels.ops.fused_step");
  return contract.attr("dense")(pybind11::handle(v)).release().ptr();
}

constexpr const char* kParameters[] = {
    "out",        "base", "v",      "u", "h1", "h2", "h3", "coefficients", "row", "velocity_rounding",
    "trajectory", "slot", "history"};
enum Parameter {
  kOut,
  kBase,
  kV,
  kU,
  kH1,
  kH2,
  kH3,
  kCoefficients,
  kRow,
  kVelocityRounding,
  kTrajectory,
  kSlot,
  kHistory,
  kParameterCount,
  kRequired = kVelocityRounding
};

// ops/reference.fused_step_ has the same signature.
PyObject* fused_step_cpu_python(PyObject*, PyObject* const* given, Py_ssize_t count, PyObject* names) try {
  PyObject* p[kParameterCount] = {};
  if (count > kParameterCount) {
    PyErr_Format(PyExc_TypeError, "fused_step_ takes 13 arguments, got %zd", count);
    return nullptr;
  }
  for (Py_ssize_t k = 0; k < count; ++k) p[k] = given[k];
  for (Py_ssize_t k = 0; names && k < PyTuple_GET_SIZE(names); ++k) {
    int place = 0;
    while (place < kParameterCount &&
           PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, k), kParameters[place]) != 0) {
      ++place;
    }
    if (place == kParameterCount || p[place]) {
      PyErr_Format(PyExc_TypeError, "fused_step_ got an unknown or repeated argument %R", PyTuple_GET_ITEM(names, k));
      return nullptr;
    }
    p[place] = given[count + k];
  }
  for (int k = 0; k < kRequired; ++k) {
    if (!p[k]) {
      PyErr_Format(PyExc_TypeError, "fused_step_ misses its argument %s", kParameters[k]);
      return nullptr;
    }
  }
  for (const int k : {kTrajectory, kHistory}) {
    if (!p[k]) p[k] = Py_None;
  }

  static PyObject* const numel_name = interned("numel");
  const Object numel_object(PyObject_CallMethodNoArgs(p[kBase], numel_name));
  const std::int64_t numel = integer(numel_object.get());
  if (numel == 0) Py_RETURN_NONE;
  const Object v(dense(p[kV]));
  const Object u(p[kU] == Py_None ? Py_NewRef(Py_None) : dense(p[kU]));
  const bool has_slots = p[kTrajectory] != Py_None;
  const Dtype state = python_dtype(p[kBase]);
  const std::int64_t row_bytes = kColumns * (state == Dtype::kFloat64 ? 8 : 4);
  char* const coefficients = static_cast<char*>(memory(p[kCoefficients]));
  const Operands o{.out = memory(p[kOut]),
                   .base = memory(p[kBase]),
                   .v = memory(v.get()),
                   .u = memory(u.get()),
                   .h = {memory(p[kH1]), memory(p[kH2]), memory(p[kH3])},
                   .row = coefficients + integer(p[kRow]) * row_bytes,
                   .trajectory = memory(p[kTrajectory]),
                   .history = memory(p[kHistory]),
                   .numel = numel,
                   .sample = has_slots ? numel / size(p[kBase], 0) : numel,
                   .slots = has_slots ? size(p[kTrajectory], 1) : 1,
                   .slot = p[kSlot] ? integer(p[kSlot]) : 0};
  if (!o.out || !o.base || !o.v || !coefficients) {
    PyErr_SetString(PyExc_ValueError, "fused_step_: an operand has no memory (a fake or wrapped tensor?)");
    return nullptr;
  }
  if (has_slots && (o.slot < 0 || o.slot >= o.slots)) {
    PyErr_SetString(PyExc_ValueError, "fused_step_: slot is out of range");
    return nullptr;
  }
  const bool rounding = p[kVelocityRounding] && truth(p[kVelocityRounding]);
  const Dtype velocity = python_dtype(v.get());
  {
    std::optional<pybind11::gil_scoped_release> released;  // worth its cost only for a large state
    if (numel > kGrain) released.emplace();
    run_cpu(o, state, velocity, rounding);
  }
  Py_RETURN_NONE;
} catch (const PythonError&) {
  return nullptr;
} catch (pybind11::error_already_set& error) {
  error.restore();
  return nullptr;
} catch (const std::exception& error) {
  PyErr_SetString(PyExc_RuntimeError, error.what());
  return nullptr;
}

PyMethodDef kFusedStepCpu = {"fused_step_cpu",
                             reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fused_step_cpu_python)),
                             METH_FASTCALL | METH_KEYWORDS,
                             "fused_step_cpu(out, base, v, u, h1, h2, h3, coefficients, row, velocity_rounding=False, "
                             "trajectory=None, slot=0, history=None)\n--\n\n"
                             "fused_step_ on the CPU, as flowmatch_kernels.ops.reference.fused_step_. Only v and u may "
                             "be non-contiguous: each costs one copy. Shapes, devices, the row and the dtypes of "
                             "others than base and v are not checked."};

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
                            std::int64_t row, int state, int velocity, bool velocity_rounding,
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
                                    .slot = slot},
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
  const auto torch = pybind11::module_::import("torch");
  const char* const names[] = {"float32", "float64", "bfloat16", "float16"};
  for (int k = 0; k < 4; ++k) torch_dtypes[k] = pybind11::object(torch.attr(names[k])).release().ptr();
  m.def("instruction_set", &instruction_set, "Name of the instruction set that the cpu backend uses here.");
  m.def("advise_huge_pages", &advise_huge_pages, pybind11::arg("address"), pybind11::arg("bytes"),
        "Asks for huge pages for fresh memory.");
  m.attr("fused_step_cpu") =
      pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&kFusedStepCpu, nullptr, nullptr));
#ifdef FLOWMATCH_KERNELS_CUDA
  m.attr("cuda_archs") = FLOWMATCH_KERNELS_CUDA;
  m.def("fused_step_cuda", &fused_step_cuda_python,
        "fused_step on a CUDA device's current stream; addresses of contiguous tensors, 0 where absent. Nothing is "
        "checked.");
#endif
}

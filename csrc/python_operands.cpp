#include "python_operands.h"

#include <algorithm>
#include <iterator>
#include <string>

#include "launch.h"
#include "overlap.h"
#include "python_tensor.h"

namespace flowmatch_kernels {
namespace {

// The fields of flowmatch_kernels.ops.fused_step.Operands.
enum Field {
  kOut,
  kBase,
  kV,
  kU,
  kH1,
  kH2,
  kH3,
  kCoefficients,
  kRow,
  kRounding,
  kGuidance,
  kSumFirst,
  kStrength,
  kTrajectory,
  kSlot,
  kHistory,
  kFieldCount
};

LaunchCuda* launch_cuda = nullptr;  // of flowmatch_kernels._C_cuda, once it is loaded

// Their names, for messages.
constexpr const char* kNames[] = {"out",      "base",         "v",    "u",        "h1",       "h2",
                                  "h3",       "coefficients", "row",  "rounding", "guidance", "sum_first",
                                  "strength", "trajectory",   "slot", "history"};
static_assert(std::size(kNames) == kFieldCount);

[[noreturn, gnu::cold]] void refuse(PyObject* type, Field k, const std::string& words) {
  raise(type, std::string("fused_step_: ") + kNames[k] + words);
}

std::string type_name(PyObject* object) { return Py_TYPE(object)->tp_name; }

std::string dtype_name(PyObject* tensor) {
  const pybind11::object dtype = pybind11::handle(tensor).attr("dtype");
  return pybind11::str(dtype).cast<std::string>();
}

// A tensor whose values lie in memory as they are: v and u may be strided.
Object dense(PyObject* tensor, Field k) {
  try {
    return flowmatch_kernels::dense(tensor);
  } catch (const PythonError&) {  // no question beforehand: it costs 0.1 us
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (is_tensor(tensor)) {
      PyErr_Restore(type, value, traceback);
      throw;
    }
    for (PyObject* const one : {type, value, traceback}) Py_XDECREF(one);
    refuse(PyExc_TypeError, k, " must be a tensor, got " + type_name(tensor));
  }
}

View look(PyObject* tensor, Field k, bool optional = false) {
  View view(tensor);
  if (tensor == Py_None && optional) return view;
  if (!view.seen || !view.memory) {
    if (!is_tensor(tensor)) refuse(PyExc_TypeError, k, " must be a tensor, got " + type_name(tensor));
    refuse(PyExc_ValueError, k, " must be a dense tensor that has memory, got a " + type_name(tensor) + " without");
  }
  return view;
}

PyObject* fused_step_python(PyObject*, PyObject* operands) {
  return guard([&]() -> PyObject* {
    if (!PyTuple_Check(operands)) {
      raise(PyExc_TypeError, "fused_step_ takes one argument, the Operands, got " + type_name(operands));
    }
    if (PyTuple_GET_SIZE(operands) != kFieldCount) {
      raise(PyExc_TypeError, "fused_step_ takes Operands of " + std::to_string(kFieldCount) + " fields, got " +
                                 std::to_string(PyTuple_GET_SIZE(operands)));
    }
    const auto field = [&](Field k) { return PyTuple_GET_ITEM(operands, k); };
    const View base(field(kBase));
    if (base.seen && base.numel() == 0) Py_RETURN_NONE;
    if (!base.seen || !base.memory) look(field(kBase), kBase);  // says what it is instead
    const Object v_dense(dense(field(kV), kV));
    const Object u_dense(field(kU) == Py_None ? Py_NewRef(Py_None) : dense(field(kU), kU).release());
    const View out = look(field(kOut), kOut), v = look(v_dense.get(), kV), u = look(u_dense.get(), kU, true);
    const View h1 = look(field(kH1), kH1, true), h2 = look(field(kH2), kH2, true), h3 = look(field(kH3), kH3, true);
    const View coefficients = look(field(kCoefficients), kCoefficients);
    const View history = look(field(kHistory), kHistory, true), strength = look(field(kStrength), kStrength, true);
    const View trajectory = look(field(kTrajectory), kTrajectory, true);
    for (const auto& [view, k] : {std::pair(&base, kBase), std::pair(&v, kV), std::pair(&out, kOut)}) {
      if (view->dtype) continue;
      refuse(PyExc_TypeError, k, " must be float32, float64, bfloat16 or float16, got " + dtype_name(field(k)));
    }
    const Dtypes dtypes{*base.dtype, *v.dtype, *out.dtype};
    const auto rounding = static_cast<Rounding>(integer(field(kRounding)));
    const bool sum_first = truth(field(kSumFirst));
    if (const auto found = mismatch(dtypes, rounding, sum_first)) raise(PyExc_TypeError, "fused_step_: " + *found);
    if (strength.seen && (sum_first || dtypes.out != dtypes.base || strength.dtype != dtypes.base)) {
      refuse(PyExc_ValueError, kStrength, " must be of base's dtype, and needs out of that dtype and no sum_first");
    }
    const bool keyed = h1.seen && h1.int64;
    if (keyed && (sum_first || dtypes.out != dtypes.base)) {
      refuse(PyExc_ValueError, kH1, " of keys needs out of base's dtype and no sum_first");
    }
    if (keyed && (!base.ndim || h1.ndim != 2 || h1.shape[0] != base.shape[0] || h1.shape[1] != 3)) {
      refuse(PyExc_ValueError, kH1, " of keys must be [B, 3]");
    }
    const std::int64_t numel = base.numel(), slot = integer(field(kSlot));
    const std::int64_t row_bytes = kColumns * size_of(arithmetic_of(dtypes.base));
    const bool own_rows = coefficients.ndim == 3;
    const std::int64_t R = own_rows ? coefficients.shape[1] : 1;
    const auto rows_each = own_rows ? rows_of_sample(base.shape, base.ndim, R) : 0;
    if (!rows_each || (own_rows && sum_first)) {
      refuse(PyExc_ValueError, kCoefficients,
             " [rows, R, 8] need R to be the product of the first sizes of base's shape, and no sum_first, got R = " +
                 std::to_string(R));
    }
    const std::int64_t slots = trajectory.seen ? trajectory.shape[1] : 1;
    if (trajectory.seen && (slot < 0 || slot >= slots)) {
      refuse(PyExc_ValueError, kSlot, " must be in [0, " + std::to_string(slots) + "), got " + std::to_string(slot));
    }
    const Operands o{.out = out.memory,
                     .base = base.memory,
                     .v = v.memory,
                     .u = u.memory,
                     .h = {h1.memory, h2.memory, h3.memory},
                     .row = static_cast<char*>(coefficients.memory) + integer(field(kRow)) * R * row_bytes,
                     .trajectory = trajectory.memory,
                     .history = history.memory,
                     .numel = numel,
                     .sample = trajectory.seen || own_rows || keyed ? numel / base.shape[0] : numel,
                     .slots = slots,
                     .slot = slot,
                     .guidance = static_cast<Guidance>(integer(field(kGuidance))),
                     .rounding = rounding,
                     .sum_first = sum_first,
                     .keyed = keyed,
                     .rows = *rows_each,
                     .strength = strength.memory};
    const std::int64_t rows = coefficients.numel() / kColumns;
    if (const auto found = overlap(o, dtypes, coefficients.memory, rows)) {
      raise(PyExc_ValueError, "fused_step_: " + *found);
    }
    if (base.device >= 0) {
      if (!launch_cuda) raise(PyExc_RuntimeError, "fused_step_: the extension's CUDA half is not loaded");
      launch_cuda(o, dtypes, base.device);
      Py_RETURN_NONE;
    }
    if (base.device != View::kHost) refuse(PyExc_ValueError, kBase, " must be on the CPU or on CUDA");
    std::optional<pybind11::gil_scoped_release> released;  // worth its cost only for a large state
    if (numel > grain(o)) released.emplace();
    launch_cpu(o, dtypes);
    released.reset();
    Py_RETURN_NONE;
  });
}

PyObject* use_cuda(PyObject*, PyObject* capsule) {
  void* const address = PyCapsule_GetPointer(capsule, kLaunchCudaCapsule);
  if (!address) return nullptr;
  launch_cuda = reinterpret_cast<LaunchCuda*>(address);
  Py_RETURN_NONE;
}
PyMethodDef kUseCuda = {"use_cuda", use_cuda, METH_O,
                        "use_cuda(capsule)\n--\n\nTakes flowmatch_kernels._C_cuda.launch for tensors on CUDA."};

PyMethodDef kFusedStep = {
    "fused_step_", fused_step_python, METH_O,
    "fused_step_(operands)\n--\n\n"
    "flowmatch_kernels.ops.fused_step on the CPU or a CUDA device's current stream. Only v and u may be "
    "non-contiguous: each costs one copy. Raises TypeError and ValueError. Shapes, devices, the row and the dtypes of "
    "others than out, base and v are not checked; overlaps are."};

// Whether two tensors lie in memory at different addresses; unknown counts as no.
PyObject* apart(PyObject*, PyObject* const* p, Py_ssize_t count) {
  return guard([&]() -> PyObject* {
    if (count != 2) raise(PyExc_TypeError, "apart takes two tensors, got " + std::to_string(count) + " arguments");
    const View v(p[0]), u(p[1]);
    return PyBool_FromLong(v.seen && u.seen && v.memory != u.memory);
  });
}
PyMethodDef kApart = {"apart", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(apart)), METH_FASTCALL,
                      "apart(v, u)\n--\n\nWhether two tensors lie in memory at different addresses."};

}  // namespace

void add_fused_step(pybind11::module_& m) {
  m.attr("fused_step_") =
      pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&kFusedStep, nullptr, nullptr));
  m.attr("use_cuda") = pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&kUseCuda, nullptr, nullptr));
  m.attr("apart") = pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&kApart, nullptr, nullptr));
}

}  // namespace flowmatch_kernels

#include "python_operands.h"

#include "launch.h"
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
  kVelocityRounding,
  kGuidance,
  kTrajectory,
  kSlot,
  kHistory,
  kFieldCount
};

View look(PyObject* tensor, bool optional = false) {
  View view(tensor);
  if (tensor == Py_None && optional) return view;
  if (!view.seen || !view.memory) raise(PyExc_ValueError, "fused_step_: an operand has no memory (a fake tensor?)");
  return view;
}

PyObject* fused_step_python(PyObject*, PyObject* operands) {
  return guard([&]() -> PyObject* {
    if (!PyTuple_Check(operands) || PyTuple_GET_SIZE(operands) != kFieldCount) {
      raise(PyExc_TypeError, "fused_step_ takes one argument, the Operands");
    }
    const auto field = [&](Field k) { return PyTuple_GET_ITEM(operands, k); };
    const View base(field(kBase));
    if (base.seen && base.numel() == 0) Py_RETURN_NONE;
    const Object v_dense(dense(field(kV)));
    const Object u_dense(field(kU) == Py_None ? Py_NewRef(Py_None) : dense(field(kU)).release());
    const View out = look(field(kOut)), v = look(v_dense.get()), u = look(u_dense.get(), true);
    const View h1 = look(field(kH1), true), h2 = look(field(kH2), true), h3 = look(field(kH3), true);
    const View coefficients = look(field(kCoefficients)), history = look(field(kHistory), true);
    const View trajectory = look(field(kTrajectory), true);
    if (!base.dtype || !v.dtype) {
      raise(PyExc_TypeError, "fused_step_: an operand is not float32, float64, bfloat16 or float16");
    }
    const std::int64_t numel = base.numel(), slot = integer(field(kSlot));
    const std::int64_t row_bytes = kColumns * (*base.dtype == Dtype::kFloat64 ? 8 : 4);
    const std::int64_t slots = trajectory.seen ? trajectory.shape[1] : 1;
    if (trajectory.seen && (slot < 0 || slot >= slots)) {
      raise(PyExc_ValueError, "fused_step_: slot is out of range");
    }
    const Operands o{.out = out.memory,
                     .base = base.memory,
                     .v = v.memory,
                     .u = u.memory,
                     .h = {h1.memory, h2.memory, h3.memory},
                     .row = static_cast<char*>(coefficients.memory) + integer(field(kRow)) * row_bytes,
                     .trajectory = trajectory.memory,
                     .history = history.memory,
                     .numel = numel,
                     .sample = trajectory.seen ? numel / base.shape[0] : numel,
                     .slots = slots,
                     .slot = slot,
                     .guidance = static_cast<Guidance>(integer(field(kGuidance)))};
    const bool rounding = truth(field(kVelocityRounding));
    if (base.device >= 0) {
#ifdef FLOWMATCH_KERNELS_CUDA
      launch_cuda(o, *base.dtype, *v.dtype, rounding, base.device);
      Py_RETURN_NONE;
#else
      raise(PyExc_RuntimeError, "fused_step_: the extension was built without CUDA");
#endif
    }
    if (base.device != View::kHost) raise(PyExc_ValueError, "fused_step_: tensors must be on the CPU or on CUDA");
    std::optional<pybind11::gil_scoped_release> released;  // worth its cost only for a large state
    if (numel > kGrain) released.emplace();
    launch_cpu(o, *base.dtype, *v.dtype, rounding);
    released.reset();
    Py_RETURN_NONE;
  });
}

PyMethodDef kFusedStep = {
    "fused_step_", fused_step_python, METH_O,
    "fused_step_(operands)\n--\n\n"
    "flowmatch_kernels.ops.fused_step on the CPU or a CUDA device's current stream. Only v and u may be "
    "non-contiguous: each costs one copy. Shapes, devices, the row and the dtypes of others than base and v are not "
    "checked."};

// Whether two tensors lie in memory at different addresses; unknown counts as no.
PyObject* apart(PyObject*, PyObject* const* p, Py_ssize_t count) {
  return guard([&]() -> PyObject* {
    if (count != 2) raise(PyExc_TypeError, "apart takes two tensors");
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
  m.attr("apart") = pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&kApart, nullptr, nullptr));
}

}  // namespace flowmatch_kernels

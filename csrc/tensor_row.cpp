#include <algorithm>
#include <memory>

#include "launch.h"
#include "python_type.h"
#include "row.h"
#include "table_rows.h"

namespace flowmatch_kernels {
namespace {

// The states of one sample(), each a tensor that PyTorch allocated. The same as `flowmatch_kernels.rows.Fresh`, with
// the same names, at a third of its cost.
class TensorRows : public TableRows {
 public:
  // What Python passes; all but the numbers are borrowed.
  struct Given {
    PyObject *shape, *coefficients, *times, *trajectory, *history, *empty_like, *launch, *fused_step_, *changed;
    int dtype, device, rounding, guidance, sum_first;
  };

  explicit TensorRows(const Given& given)
      : TableRows(sizes(given.shape), static_cast<Dtype>(given.dtype), given.device, given.coefficients,
                  slots(given.trajectory), given.rounding, given.guidance, given.sum_first),
        times_(kept(given.times)),
        trajectory_tensor_(kept(given.trajectory)),
        history_tensors_(kept(given.history)),
        empty_like_(kept(given.empty_like)),
        launch_(kept(given.launch)),
        fused_step_(kept(given.fused_step_)),
        changed_(kept(given.changed)) {
    if (!PyTuple_Check(given.times) || !PyTuple_Check(given.history)) {
      raise(PyExc_TypeError, "TensorRows: wanted tuples of times and of history buffers");
    }
    trajectory_ = memory(given.trajectory);
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(given.history); ++k) {
      history_.push_back(memory(PyTuple_GET_ITEM(given.history, k)));
    }
    if (PyCapsule_CheckExact(given.launch)) {
      launch_cuda_ = reinterpret_cast<LaunchCuda*>(PyCapsule_GetPointer(given.launch, kLaunchCudaCapsule));
      if (!launch_cuda_) throw PythonError();
    }
  }

  // v = step_fn(x=x, t=t), x being a tensor of its own over the state. A write to x is a write to the state.
  PyObject* evaluate(PyObject* step_fn, PyObject* state, Py_ssize_t k) const {
    if (k < 0 || k >= PyTuple_GET_SIZE(times_.get())) raise(PyExc_IndexError, "Rows: there is no such time");
    static PyObject* const detach = interned("detach");
    const bool counted = trajectory_ && at_base_;
    const std::int64_t before = counted ? version(state) : 0;
    const Object x(PyObject_CallMethodNoArgs(state, detach));
    Object v(call(step_fn, x.get(), PyTuple_GET_ITEM(times_.get(), k)));
    if (!same_memory(state, x.get()) || (counted && version(state) != before)) {
      PyObject* const trajectory = counted ? trajectory_tensor_.get() : Py_None;
      Object(PyObject_CallFunctionObjArgs(changed_.get(), state, x.get(), trajectory,
                                          Object(PyLong_FromLongLong(slot_)).get(), nullptr));
    }
    return v.release();
  }

  // The next state; None, with nothing written, where a velocity is no plain dense tensor of the state's shape.
  PyObject* step(PyObject* base, PyObject* v, PyObject* u, std::int64_t number, PyObject* evaluation) {
    auto made = row(v, u, number, evaluation);
    if (!made) Py_RETURN_NONE;
    Object out(PyObject_CallOneArg(empty_like_.get(), base));
    if (numel_ != 0) {
      made->operands.base = memory(base);
      made->operands.out = memory(out.get());
      if (launch_cuda_) {
        (*launch_cuda_)(made->operands, made->dtypes, device_);
      } else {
        launch_by_python(*made, out.get(), base, v, u, number, evaluation);
      }
    }
    took(*made);
    return out.release();
  }

 private:
  static Object kept(PyObject* object) { return Object(Py_NewRef(object)); }

  static char* memory(PyObject* tensor) {
    if (tensor == Py_None) return nullptr;
    const View view(tensor);
    if (!view.seen || !view.memory) {
      if (view.seen && view.numel() == 0) return nullptr;
      raise(PyExc_ValueError, "a state has no memory (a storage that was resized?)");
    }
    return static_cast<char*>(view.memory);
  }

  static std::int64_t slots(PyObject* trajectory) {
    if (trajectory == Py_None) return 0;
    const View view(trajectory);
    return view.ndim > 1 ? view.shape[1] : 0;
  }

  // Whether x is the state, contiguous and in its shape, as it was made.
  bool same_memory(PyObject* state, PyObject* x) const {
    const View a(state), b(x);
    return a.seen && fits(b) && b.dtype == dtype_ && a.memory == b.memory && b.contiguous() && !negative(x);
  }

  // Two launches have one key only where their kernel is the same, but for alignments.
  std::int64_t key(const Row& row) const {
    const Operands& o = row.operands;
    std::int64_t key = static_cast<int>(row.dtypes.base);
    key = key * 4 + static_cast<int>(row.dtypes.velocity);
    for (const void* operand :
         {o.u, o.h[0], o.h[1], o.h[2], static_cast<const void*>(o.trajectory), static_cast<const void*>(o.history)}) {
      key = key * 2 + (operand != nullptr);
    }
    key = key * 4 + static_cast<int>(rounding_);
    key = key * 4 + (o.u ? static_cast<int>(guidance_) : 0);
    return key * 2 + sum_first_;
  }

  // launch(key, device, addresses, arguments) launches a kernel that is compiled already; where it returns False,
  // fused_step_(operands, key) compiles it. Where there is no launch, fused_step_(operands) serves.
  void launch_by_python(const Row& row, PyObject* out, PyObject* base, PyObject* v, PyObject* u, std::int64_t number,
                        PyObject* evaluation) const {
    const Operands& o = row.operands;
    const Object its_key(PyLong_FromLongLong(key(row)));
    if (launch_.get() != Py_None) {
      const void* const pointers[] = {o.out, o.base, o.v, o.u, o.h[0], o.h[1], o.h[2], rows_, o.trajectory, o.history};
      constexpr Py_ssize_t kPointers = std::size(pointers), kRows = 7;
      Object arguments(PyTuple_New(kPointers + 8));
      std::uintptr_t addresses = 0;
      Py_ssize_t k = 0;
      const auto put = [&](PyObject* object) { PyTuple_SET_ITEM(arguments.get(), k++, Object(object).release()); };
      for (const void* pointer : pointers) {
        if (k != kRows) addresses |= reinterpret_cast<std::uintptr_t>(pointer);
        put(pointer ? PyLong_FromVoidPtr(const_cast<void*>(pointer)) : Py_NewRef(Py_None));
      }
      const std::int64_t sample = o.trajectory ? o.sample : o.numel;
      const std::int64_t guidance = o.u ? static_cast<int>(guidance_) : 0;
      for (const std::int64_t value : {number, o.numel, sample, o.trajectory ? o.slots : 1, o.slot,
                                       static_cast<std::int64_t>(rounding_), guidance}) {
        put(PyLong_FromLongLong(value));
      }
      put(PyBool_FromLong(sum_first_));
      const Object device(PyLong_FromLong(device_));
      const Object all(PyLong_FromUnsignedLongLong(addresses));
      PyObject* given[] = {its_key.get(), device.get(), all.get(), arguments.get()};
      if (truth(Object(PyObject_Vectorcall(launch_.get(), given, std::size(given), nullptr)).get())) return;
    }
    const auto term = [&](Py_ssize_t k) {
      PyObject* const read = PyTuple_GET_ITEM(evaluation, 2);
      return k < PyTuple_GET_SIZE(read) ? history(PyTuple_GET_ITEM(read, k)) : Py_None;
    };
    PyObject* const write = PyTuple_GET_ITEM(evaluation, 3);
    const Object operands(
        Py_BuildValue("(OOOOOOOOLiiOOLO)", out, base, v, u, term(0), term(1), term(2), coefficients_.get(),
                      static_cast<long long>(number), static_cast<int>(rounding_), static_cast<int>(guidance_),
                      sum_first_ ? Py_True : Py_False, row.commit ? trajectory_tensor_.get() : Py_None,
                      static_cast<long long>(o.slot), write == Py_None ? Py_None : history(write)));
    PyObject* const launched_by = launch_.get() == Py_None ? nullptr : its_key.get();
    Object(PyObject_CallFunctionObjArgs(fused_step_.get(), operands.get(), launched_by, nullptr));
  }

  PyObject* history(PyObject* number) const { return PyTuple_GET_ITEM(history_tensors_.get(), integer(number)); }

  Object times_, trajectory_tensor_, history_tensors_, empty_like_, launch_, fused_step_, changed_;
  LaunchCuda* launch_cuda_ = nullptr;
};

PyObject* tensor_rows_new(PyTypeObject* type, PyObject* arguments, PyObject*) {
  return guard([&]() -> PyObject* {
    TensorRows::Given given;
    if (!PyArg_ParseTuple(arguments, "OiiOOOOiipOOOO:TensorRows", &given.shape, &given.dtype, &given.device,
                          &given.coefficients, &given.times, &given.trajectory, &given.history, &given.rounding,
                          &given.guidance, &given.sum_first, &given.empty_like, &given.launch, &given.fused_step_,
                          &given.changed)) {
      return nullptr;
    }
    return make(type, std::make_unique<TensorRows>(given));
  });
}

PyMethodDef kMethods[] = {
    define<TensorRows, 3,
           [](TensorRows& rows, PyObject* const* p) { return rows.evaluate(p[0], p[1], integer(p[2])); }>(
        "evaluate", "evaluate(step_fn, state, time)\n--\n\nstep_fn(x=state, t=the time of that number)"),
    define<TensorRows, 6,
           [](TensorRows& rows, PyObject* const* p) { return rows.step(p[1], p[2], p[3], integer(p[4]), p[5]); }>(
        "step",
        "step(state, base, v, u, row, evaluation)\n--\n\nThe next state; None where a velocity is no dense tensor."),
    define<TensorRows, 0, [](TensorRows& rows, PyObject* const*) { return PyLong_FromLongLong(rows.slot()); }>(
        "slot", "slot()\n--\n\nThe slot of base."),
    {nullptr, nullptr, 0, nullptr}};

PyType_Slot kSlots[] = {
    {Py_tp_new, reinterpret_cast<void*>(tensor_rows_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(&deallocate<TensorRows>)},
    {Py_tp_methods, kMethods},
    {Py_tp_doc,
     const_cast<char*>("TensorRows(shape, dtype, device, coefficients, times, trajectory, history, rounding, "
                       "guidance, sum_first, empty_like, launch, fused_step_, changed)\n--\n\n"
                       "The states of one sample(), each a tensor that PyTorch allocated.")},
    {0, nullptr}};
PyType_Spec kSpec = {"flowmatch_kernels._C.TensorRows", sizeof(PythonObject<TensorRows>), 0, Py_TPFLAGS_DEFAULT,
                     kSlots};

}  // namespace

void add_tensor_rows(pybind11::module_& m) {
  m.attr("TensorRows") = pybind11::reinterpret_steal<pybind11::object>(PyType_FromSpec(&kSpec));
}

}  // namespace flowmatch_kernels

#include <algorithm>
#include <iterator>
#include <memory>
#include <optional>
#include <vector>

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
    PyObject *shape, *coefficients, *times, *trajectory, *history, *strength, *empty_like, *launch, *fused_step_,
        *changed;
    int dtype, device, rounding, guidance, sum_first, read_once;
  };

  explicit TensorRows(const Given& given)
      : TableRows(sizes(given.shape), static_cast<Dtype>(given.dtype), given.device, given.coefficients,
                  slots(given.trajectory), given.rounding, given.guidance, given.sum_first, given.strength),
        times_(kept(given.times)),
        trajectory_tensor_(kept(given.trajectory)),
        history_tensors_(kept(given.history)),
        empty_like_(kept(given.empty_like)),
        launch_(kept(given.launch)),
        fused_step_(kept(given.fused_step_)),
        changed_(kept(given.changed)),
        read_once_(given.read_once) {
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

  // v = step_fn(x=x, t=t), x being a tensor of its own over the state, or the state itself where nobody else reads it
  // but the step that follows. A write to x is a write to the state.
  PyObject* evaluate(PyObject* step_fn, PyObject* state, Py_ssize_t k) {
    if (k < 0 || k >= PyTuple_GET_SIZE(times_.get())) raise(PyExc_IndexError, "Rows: there is no such time");
    const bool counted = trajectory_ && at_base_;
    const std::int64_t before = counted ? version(state) : 0;
    const bool itself = unread_ && unread_->get() == state;
    unread_.reset();
    const Object x = itself ? kept(state) : detached(state);
    Object v(call(step_fn, x.get(), PyTuple_GET_ITEM(times_.get(), k)));
    const bool replaced = !is_state(x.get(), itself ? unread_memory_ : View(state).memory);
    if (replaced || (counted && version(state) != before)) {
      PyObject* const trajectory = counted ? trajectory_tensor_.get() : Py_None;
      Object(PyObject_CallFunctionObjArgs(changed_.get(), state, x.get(), replaced ? Py_True : Py_False, trajectory,
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
      if (read_once_) unread_.emplace(Py_NewRef(out.get())), unread_memory_ = made->operands.out;
    }
    took(*made);
    return out.release();
  }

 private:
  static Object kept(PyObject* object) { return Object(Py_NewRef(object)); }

  static Object detached(PyObject* tensor) {
    static PyObject* const detach = interned("detach");
    return Object(PyObject_CallMethodNoArgs(tensor, detach));
  }

  static char* memory(PyObject* tensor) {
    if (tensor == Py_None) return nullptr;
    const View view(tensor);
    if (!view.seen || !view.memory) {
      if (view.seen && view.numel() == 0) return nullptr;
      no_memory();
    }
    return static_cast<char*>(view.memory);
  }

  static std::int64_t slots(PyObject* trajectory) {
    if (trajectory == Py_None) return 0;
    const View view(trajectory);
    return view.ndim > 1 ? view.shape[1] : 0;
  }

  // Whether x is the state of this memory, contiguous and in its shape, as it was made.
  bool is_state(PyObject* x, const void* memory) const {
    const View view(x);
    if (!fits(view) || view.dtype != dtype_) return false;
    if (numel_ && !view.memory && !lazy(x)) no_memory();
    return view.memory == memory && view.contiguous() && !negative(x);
  }

  [[noreturn]] static void no_memory() {
    raise(PyExc_ValueError, "a state has no memory (a storage that was resized?)");
  }

  // Two launches have one key only where their kernel is the same, but for alignments.
  std::int64_t key(const Row& row) const {
    const Operands& o = row.operands;
    std::int64_t key = static_cast<int>(row.dtypes.base);
    key = key * 4 + static_cast<int>(row.dtypes.velocity);
    for (const void* operand : {o.u, o.h[0], o.h[1], o.h[2], static_cast<const void*>(o.trajectory),
                                static_cast<const void*>(o.history), o.strength}) {
      key = key * 2 + (operand != nullptr);
    }
    key = key * 4 + static_cast<int>(rounding_);
    key = key * 4 + form(o);
    key = key * 2 + (o.rows != 0);
    key = key * 2 + o.keyed;
    return key * 2 + sum_first_;
  }

  // cuLaunchKernel(function, grid, block, shared, stream, parameters, extra)
  using LaunchKernel = int(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                           void**);

  // A compiled kernel, as launch_(key, device, aligned, sample) knows it.
  struct Compiled {
    std::int64_t key;
    Object fields;
    enum { kVector, kBlock, kStream, kRun, kFunction, kMetadata, kThreads, kLaunchKernel, kCount };
    PyObject* field(Py_ssize_t k) const { return PyTuple_GET_ITEM(fields.get(), k); }
    std::int64_t block = integer(field(kBlock)), threads = integer(field(kThreads));
    // Where Triton's own launcher would do nothing else.
    LaunchKernel* launch_kernel = threads ? reinterpret_cast<LaunchKernel*>(integer(field(kLaunchKernel))) : nullptr;
  };

  // Where it has launched this key before, the kernel.
  const Compiled* compiled(std::int64_t key, bool aligned, std::int64_t sample) {
    const std::int64_t its_key = key * 2 + aligned;
    const auto found =
        std::find_if(compiled_.begin(), compiled_.end(), [&](const Compiled& one) { return one.key == its_key; });
    if (found != compiled_.end()) return &*found;
    const Object numbers[] = {number(key), number(device_), Object(PyBool_FromLong(aligned)), number(sample)};
    PyObject* given[] = {numbers[0].get(), numbers[1].get(), numbers[2].get(), numbers[3].get()};
    Object fields(PyObject_Vectorcall(launch_.get(), given, std::size(given), nullptr));
    if (!PyTuple_Check(fields.get()) || PyTuple_GET_SIZE(fields.get()) != Compiled::kCount) return nullptr;
    compiled_.push_back({its_key, std::move(fields)});
    return &compiled_.back();
  }

  static Object number(std::int64_t value) { return Object(PyLong_FromLongLong(value)); }

  // A launch past Triton's JIT: by CUDA's driver, or by Triton's own launcher. False where only the JIT may.
  bool launch_compiled(const Row& row, std::int64_t key, std::int64_t number_of_row) {
    const Operands& o = row.operands;
    const void* const pointers[] = {o.out,  o.base, o.v,          o.u,       o.h[0],    o.h[1],
                                    o.h[2], rows_,  o.trajectory, o.history, o.strength};
    std::uintptr_t addresses = 0;
    for (const void* pointer : pointers) {
      const bool scalar = pointer == rows_ || (o.keyed && pointer == o.h[0]);
      addresses |= scalar ? 0 : reinterpret_cast<std::uintptr_t>(pointer);
    }
    const std::int64_t sample = o.trajectory || o.keyed ? o.sample : o.numel;
    const std::int64_t span = o.rows ? o.span() : o.numel;
    const bool aligned = addresses % 16 == 0 && (!o.keyed || sample % 4 == 0);
    const Compiled* const kernel = compiled(key, aligned, o.rows ? span : sample);
    if (!kernel) return false;
    const Object stream(PyObject_CallNoArgs(kernel->field(Compiled::kStream)));
    if (stream.get() == Py_None) {
      compiled_.clear();
      return false;
    }
    const std::int64_t blocks = (o.numel + kernel->block - 1) / kernel->block;
    const std::int64_t numbers[] = {number_of_row * R_, o.numel, sample, o.trajectory ? o.slots : 1, o.slot, span};
    if (kernel->launch_kernel) {
      launch_by_driver(*kernel, blocks, stream.get(), pointers, numbers);
      return true;
    }
    std::vector<Object> kept;
    const auto keep = [&](PyObject* object) {
      kept.emplace_back(object);
      return object;
    };
    PyObject* const one = keep(PyLong_FromLong(1));
    std::vector<PyObject*> arguments{keep(PyLong_FromLongLong(blocks)),
                                     one,
                                     one,
                                     stream.get(),
                                     kernel->field(Compiled::kFunction),
                                     kernel->field(Compiled::kMetadata),
                                     Py_None,  // no launch metadata and no hooks: with a hook set the JIT launches
                                     Py_None,
                                     Py_None};
    for (const void* pointer : pointers) {
      arguments.push_back(pointer ? keep(PyLong_FromVoidPtr(const_cast<void*>(pointer))) : Py_None);
    }
    for (const std::int64_t value : numbers) arguments.push_back(keep(PyLong_FromLongLong(value)));
    for (const int value : {static_cast<int>(rounding_), form(o)}) arguments.push_back(keep(PyLong_FromLong(value)));
    for (const bool flag : {sum_first_, o.rows != 0}) arguments.push_back(flag ? Py_True : Py_False);
    arguments.push_back(kernel->field(Compiled::kVector));
    arguments.push_back(kernel->field(Compiled::kBlock));
    Object(PyObject_Vectorcall(kernel->field(Compiled::kRun), arguments.data(), arguments.size(), nullptr));
    return true;
  }

  // With the parameters that `_unknown` of ops/triton_launcher.py has found in the PTX: the pointers that there are,
  // the numbers, and two pointers to memory for the kernel's own use, of which it has none.
  template <std::size_t kPointers, std::size_t kNumbers>
  static void launch_by_driver(const Compiled& kernel, std::int64_t blocks, PyObject* stream,
                               const void* const (&pointers)[kPointers], const std::int64_t (&numbers)[kNumbers]) {
    std::uint64_t values[kPointers + kNumbers + 2];
    std::size_t count = 0;
    for (const void* pointer : pointers) {
      if (pointer) values[count++] = reinterpret_cast<std::uintptr_t>(pointer);
    }
    for (const std::int64_t number : numbers) values[count++] = static_cast<std::uint64_t>(number);
    values[count++] = 0;
    values[count++] = 0;
    void* parameters[std::size(values)];
    for (std::size_t k = 0; k < count; ++k) parameters[k] = &values[k];
    void* const on = PyLong_AsVoidPtr(stream);
    void* const function = PyLong_AsVoidPtr(kernel.field(Compiled::kFunction));
    if (PyErr_Occurred()) throw PythonError();
    int error = 0;
    Py_BEGIN_ALLOW_THREADS;  // it waits where the device's queue is full
    error = kernel.launch_kernel(function, static_cast<unsigned>(blocks), 1, 1, static_cast<unsigned>(kernel.threads),
                                 1, 1, 0, on, parameters, nullptr);
    Py_END_ALLOW_THREADS;
    if (error) raise(PyExc_RuntimeError, "Triton's kernel was not launched: CUDA error " + std::to_string(error));
  }

  int form(const Operands& o) const { return o.u ? static_cast<int>(guidance_) : 0; }

  // By a kernel that is compiled already, or else by fused_step_(operands, key), which compiles it. Where there is no
  // launch_, by fused_step_(operands).
  void launch_by_python(const Row& row, PyObject* out, PyObject* base, PyObject* v, PyObject* u, std::int64_t number,
                        PyObject* evaluation) {
    const bool has_launch = launch_.get() != Py_None;
    const std::int64_t its_key = has_launch ? key(row) : 0;
    if (has_launch && launch_compiled(row, its_key, number)) return;
    const auto term = [&](Py_ssize_t k) {
      PyObject* const read = PyTuple_GET_ITEM(evaluation, 2);
      return k < PyTuple_GET_SIZE(read) ? history(PyTuple_GET_ITEM(read, k)) : Py_None;
    };
    PyObject* const write = PyTuple_GET_ITEM(evaluation, 3);
    const Object plain_base = detached(base);  // a step_fn may have asked for its gradient
    const Object operands(Py_BuildValue(
        "(OOOOOOOOLiiOOOLO)", out, plain_base.get(), v, u, term(0), term(1), term(2), coefficients_.get(),
        static_cast<long long>(number), static_cast<int>(rounding_), static_cast<int>(guidance_),
        sum_first_ ? Py_True : Py_False, strength_tensor_.get(), row.commit ? trajectory_tensor_.get() : Py_None,
        static_cast<long long>(row.operands.slot), write == Py_None ? Py_None : history(write)));
    const Object key_object(PyLong_FromLongLong(its_key));
    PyObject* const last = has_launch ? key_object.get() : nullptr;
    Object(PyObject_CallFunctionObjArgs(fused_step_.get(), operands.get(), last, nullptr));
  }

  PyObject* history(PyObject* number) const {
    const std::int64_t k = integer(number);
    return k == noise_ ? keys_tensor_.get() : PyTuple_GET_ITEM(history_tensors_.get(), k);
  }

  Object times_, trajectory_tensor_, history_tensors_, empty_like_, launch_, fused_step_, changed_;
  LaunchCuda* launch_cuda_ = nullptr;
  bool read_once_;                // each state by one call of step_fn and by the step that follows it
  std::optional<Object> unread_;  // the last state, until a step_fn gets it
  const void* unread_memory_ = nullptr;
  std::vector<Compiled> compiled_;  // few: a table has few kinds of rows
};

PyObject* tensor_rows_new(PyTypeObject* type, PyObject* arguments, PyObject*) {
  return guard([&]() -> PyObject* {
    TensorRows::Given given;
    if (!PyArg_ParseTuple(arguments, "OiiOOOOiipOpOOOO:TensorRows", &given.shape, &given.dtype, &given.device,
                          &given.coefficients, &given.times, &given.trajectory, &given.history, &given.rounding,
                          &given.guidance, &given.sum_first, &given.strength, &given.read_once, &given.empty_like,
                          &given.launch, &given.fused_step_, &given.changed)) {
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
    define<TensorRows, 2, [](TensorRows& rows, PyObject* const* p) { return drawn(rows, p); }>(
        "draw", "draw(k, keys)\n--\n\nRows that read history buffer k read the noise of these keys instead."),
    define<TensorRows, 0, [](TensorRows& rows, PyObject* const*) { return PyLong_FromLongLong(rows.slot()); }>(
        "slot", "slot()\n--\n\nThe slot of base."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_tensor_rows(pybind11::module_& m) {
  m.attr("TensorRows") = pybind11::reinterpret_steal<pybind11::object>(
      type_of<TensorRows>("flowmatch_kernels._C.TensorRows", tensor_rows_new, kMethods,
                          "TensorRows(shape, dtype, device, coefficients, times, trajectory, history, rounding, "
                          "guidance, sum_first, strength, read_once, empty_like, launch, fused_step_, changed)\n--\n\n"
                          "The states of one sample(), each a tensor that PyTorch allocated."));
}

}  // namespace flowmatch_kernels

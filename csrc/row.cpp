#include "row.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>

#include "block_tensor.h"
#include "launch.h"

namespace flowmatch_kernels {
namespace {

// The loop's name for a state: its memory, of which it holds one use.
struct State {
  PyObject_HEAD;
  Use block;
};
PyTypeObject* state_type;

PyObject* make_state(Use block) {
  auto* state = reinterpret_cast<State*>(state_type->tp_alloc(state_type, 0));
  if (!state) throw PythonError();
  new (&state->block) Use(std::move(block));
  return reinterpret_cast<PyObject*>(state);
}

void state_dealloc(PyObject* object) {
  reinterpret_cast<State*>(object)->block.~Use();
  PyTypeObject* const type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

State& state_of(PyObject* object) {
  if (Py_TYPE(object) != state_type) raise(PyExc_TypeError, "Rows: wanted a state of its own");
  return *reinterpret_cast<State*>(object);
}

// The states of one sample(). `flowmatch_kernels.rows.Fresh` does the same with the same names in Python.
class Rows {
 public:
  Rows(PyObject* shape, int dtype, PyObject* coefficients, PyObject* times, Py_ssize_t slots, Py_ssize_t buffers,
       int rounding, int guidance, bool sum_first, bool deferred)
      : coefficients_(Py_NewRef(coefficients)),
        rounding_(static_cast<Rounding>(rounding)),
        guidance_(static_cast<Guidance>(guidance)),
        sum_first_(sum_first),
        slots_(slots),
        deferred_(deferred) {
    const View rows(coefficients), grid(times);
    if (!rows.seen || !grid.seen || !grid.dtype || !PyTuple_Check(shape) || PyTuple_GET_SIZE(shape) == 0) {
      raise(PyExc_TypeError, "Rows: wanted a shape, and coefficients and times on the CPU");
    }
    rows_ = static_cast<char*>(rows.memory);
    std::vector<std::int64_t> sizes;
    for (Py_ssize_t d = 0; d < PyTuple_GET_SIZE(shape); ++d) sizes.push_back(integer(PyTuple_GET_ITEM(shape, d)));
    check_bytes(sizes, slots);
    const std::int64_t batch = sizes[0];
    std::vector<std::int64_t> ones(sizes.size(), 1), strides(sizes.size(), 1);
    ones[0] = batch;
    if (batch != 1) strides[0] = 0;  // as expand makes it
    time_ = {*grid.dtype, std::move(ones), std::move(strides)};
    x_ = Layout::contiguous(static_cast<Dtype>(dtype), std::move(sizes));
    numel_ = x_.numel(), sample_ = batch ? numel_ / batch : 0;
    times_count_ = grid.shape[0];
    times_ = take(times_count_, *grid.dtype);
    std::memcpy(times_.memory(), grid.memory, times_count_ * size_of(*grid.dtype));
    if (slots) trajectory_ = take(numel_ * slots, x_.dtype);
    for (Py_ssize_t k = 0; k < buffers; ++k) history_.push_back(take(numel_, arithmetic_of(x_.dtype)));
  }

  // A tensor over fresh memory, which start() takes as it is.
  PyObject* empty() {
    empty_ = take(numel_, x_.dtype);
    return tensor_over(empty_.get(), x_);
  }

  // The state that holds a tensor's values, as the new base; None for a tensor that has to be copied by PyTorch.
  PyObject* start(PyObject* tensor) {
    const View view(tensor);
    if (!fits(view) || view.dtype != x_.dtype || !view.contiguous() || lazy(tensor)) Py_RETURN_NONE;
    Use block = empty_ && view.memory == empty_.memory() ? std::move(empty_) : Use();
    if (!block) {
      block = take(numel_, x_.dtype);
      copy(block.memory(), static_cast<const char*>(view.memory), numel_ * size_of(x_.dtype));
    }
    empty_ = Use();
    at_base_ = true;
    Object state(make_state(std::move(block)));
    if (!deferred_) keep(state.get());
    return state.release();
  }

  PyObject* tensor(PyObject* state) const { return tensor_over(state_of(state).block.get(), x_); }

  PyObject* time(Py_ssize_t k) const {
    if (k < 0 || k >= times_count_) raise(PyExc_IndexError, "Rows: there is no such time");
    return tensor_over(times_.get(), time_, k);
  }

  // v = step_fn(x=x, t=t), x and t being tensors of its own. A write to x is a write to the state.
  PyObject* evaluate(PyObject* step_fn, PyObject* state, Py_ssize_t k) {
    const Object x(tensor(state)), t(time(k));
    PyObject* arguments[] = {nullptr, x.get(), t.get()};
    static PyObject* const names = keywords();
    Object v(PyObject_Vectorcall(step_fn, arguments + 1, PY_VECTORCALL_ARGUMENTS_OFFSET, names));
    const bool moved = settle(state, x.get());
    if (slots_ && at_base_ && (deferred_ || moved || version(x.get()) != 0)) keep(state);
    return v.release();
  }

  // A tensor over the state may have been replaced in place: x.data = y, x.share_memory_(), torch.utils.swap_tensors,
  // x.transpose_(). Its values count. Whether it was.
  bool settle(PyObject* state, PyObject* x) const {
    Block* const block = state_of(state).block.get();
    const View view(x);
    const bool fitting = view.seen && fits(view) && view.dtype == x_.dtype;
    if (fitting && view.memory == block->memory && view.contiguous()) return false;
    if (!fitting || (numel_ && !view.memory)) {
      raise(PyExc_ValueError,
            "x was replaced in place by a tensor of another shape, dtype or device: return a new tensor instead");
    }
    const Object values(dense(x));
    const View moved(values.get());
    Use fresh = take(numel_, x_.dtype);
    copy(fresh.memory(), static_cast<const char*>(moved.memory), numel_ * size_of(x_.dtype));
    state_of(state).block = std::move(fresh);
    return true;
  }

  // The next state; None, with nothing written, where a velocity is no plain dense tensor of the state's shape.
  // `evaluation` is flowmatch_kernels.solvers.Evaluation.
  PyObject* step(PyObject* state, PyObject* base, PyObject* v, PyObject* u, std::int64_t row, PyObject* evaluation) {
    const View first(v), second(u);
    if (!usable(v, first) || (u != Py_None && !(usable(u, second) && second.dtype == first.dtype))) Py_RETURN_NONE;
    if (numel_ && (!first.memory || (u != Py_None && !second.memory))) {
      raise(PyExc_ValueError, "a velocity has no memory (a wrapped tensor, or a storage that was resized?)");
    }
    if (!PyTuple_Check(evaluation) || PyTuple_GET_SIZE(evaluation) != 4) {
      raise(PyExc_TypeError, "Rows: wanted an Evaluation");
    }
    const bool commit = truth(PyTuple_GET_ITEM(evaluation, 1));
    PyObject *const read = PyTuple_GET_ITEM(evaluation, 2), *const write = PyTuple_GET_ITEM(evaluation, 3);
    const void* h[3] = {};
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(read); ++k) h[k] = buffer(PyTuple_GET_ITEM(read, k));
    void* const remembered = write == Py_None ? nullptr : buffer(write);
    Object out(next(state, base, commit));
    slot_ += commit, at_base_ = commit;
    const std::int64_t row_bytes = kColumns * size_of(arithmetic_of(x_.dtype));
    const Operands o{.out = state_of(out.get()).block.memory(),
                     .base = state_of(base).block.memory(),
                     .v = first.memory,
                     .u = second.memory,
                     .h = {h[0], h[1], h[2]},
                     .row = rows_ + row * row_bytes,
                     .trajectory = commit && !deferred_ ? trajectory_.memory() : nullptr,
                     .history = remembered,
                     .numel = numel_,
                     .sample = sample_,
                     .slots = std::max<std::int64_t>(slots_, 1),
                     .slot = slot_,
                     .guidance = guidance_,
                     .rounding = rounding_,
                     .sum_first = sum_first_};
    if (numel_ == 0) return out.release();
    std::optional<pybind11::gil_scoped_release> released;  // worth its cost only for a large state
    if (numel_ > kGrain) released.emplace();
    launch_cpu(o, {x_.dtype, *first.dtype, x_.dtype});
    released.reset();
    return out.release();
  }

  // The trajectory, [B, slots, *x_dims]; the last state is written to its slot if it was not yet.
  PyObject* trajectory(PyObject* state) const {
    if (deferred_) keep(state);
    return slots();
  }

  PyObject* slots() const {
    if (!slots_) raise(PyExc_ValueError, "Rows: no trajectory was asked for");
    std::vector<std::int64_t> shape = x_.shape;
    shape.insert(shape.begin() + 1, slots_);
    return tensor_over(trajectory_.get(), Layout::contiguous(x_.dtype, std::move(shape)));
  }

  PyObject* time_steps(Py_ssize_t count) const {
    const Use copy = take(count, time_.dtype);
    std::memcpy(copy.memory(), times_.memory(), std::min(count, times_count_) * size_of(time_.dtype));
    return tensor_over(copy.get(), Layout::contiguous(time_.dtype, {count}));
  }

  PyObject* history(Py_ssize_t k) const {
    return tensor_over(history_.at(k).get(), Layout::contiguous(arithmetic_of(x_.dtype), x_.shape));
  }

  std::int64_t slot() const { return slot_; }

  // Whether v lies in the state's memory: it is x, or a view of it.
  bool owns(PyObject* state, PyObject* v) const {
    const View view(v);
    const char *const at = static_cast<char*>(view.memory), *const begin = state_of(state).block.memory();
    return view.seen && at >= begin && at < begin + numel_ * size_of(x_.dtype);
  }

 private:
  // Their product would overflow, and the tensor over them ends the process.
  static void check_bytes(const std::vector<std::int64_t>& sizes, std::int64_t slots) {
    if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return;
    std::int64_t room = std::numeric_limits<std::int64_t>::max() / static_cast<std::int64_t>(sizeof(double));
    room /= std::max<std::int64_t>(slots, 1);
    for (const std::int64_t size : sizes) room /= size;
    if (room == 0) throw std::invalid_argument("batch_size and x_dims make states that are too large for any memory");
  }

  static Use take(std::int64_t numel, Dtype dtype) { return Use(take_block(numel * size_of(dtype))); }

  static PyObject* keywords() {
    PyObject* const names = Py_BuildValue("(NN)", interned("x"), interned("t"));
    if (!names) throw PythonError();
    return names;
  }

  static void copy(char* to, const char* from, std::int64_t bytes) {
    if (bytes <= kGrain) {
      std::memcpy(to, from, bytes);
    } else {
      torch::stable::parallel_for(0, bytes, 4 * kGrain, [&](std::int64_t begin, std::int64_t end) {
        std::memcpy(to + begin, from + begin, end - begin);
      });
    }
  }

  // Writes a state to base's slot.
  void keep(PyObject* state) const {
    if (!slots_ || !numel_) return;
    const std::int64_t bytes = sample_ * size_of(x_.dtype);
    const char* const from = state_of(state).block.memory();
    for (std::int64_t b = 0; b < x_.shape[0]; ++b) {
      copy(trajectory_.memory() + (b * slots_ + slot_) * bytes, from + b * bytes, bytes);
    }
  }

  // How often x was written to, as far as PyTorch counts it.
  static std::int64_t version(PyObject* x) {
    static PyObject* const name = interned("_version");
    return integer(Object(PyObject_GetAttr(x, name)).get());
  }

  bool fits(const View& view) const {
    return view.seen && view.plain && view.device == View::kHost && view.dtype &&
           view.ndim == static_cast<int>(x_.shape.size()) && std::equal(x_.shape.begin(), x_.shape.end(), view.shape);
  }
  bool usable(PyObject* v, const View& view) const {
    return fits(view) && dispatch({x_.dtype, *view.dtype, x_.dtype}, rounding_, sum_first_, [](auto) {}) &&
           view.contiguous() && !lazy(v);
  }

  void* buffer(PyObject* number) const { return history_.at(integer(number)).memory(); }

  // Where the next state goes: memory that nobody else holds, in place if it may; base's, only where the step ends.
  PyObject* next(PyObject* state, PyObject* base, bool commit) const {
    if (commit && !held(state_of(base).block.get())) return Py_NewRef(base);
    if (state != base && !held(state_of(state).block.get())) return Py_NewRef(state);
    return make_state(take(numel_, x_.dtype));
  }

  Object coefficients_;
  char* rows_;
  Layout x_, time_;
  Use times_, trajectory_, empty_;
  std::vector<Use> history_;
  Rounding rounding_;
  Guidance guidance_;
  bool sum_first_;
  std::int64_t numel_, sample_, times_count_, slots_;
  std::int64_t slot_ = 0;  // of base
  bool deferred_;          // slots are written after the model has seen the state, not by the step
  bool at_base_ = true;    // the state is base, and not one within a step
};

// ---- the Python type ----

struct RowsObject {
  PyObject_HEAD;
  Rows* rows;
};

PyObject* rows_new(PyTypeObject* type, PyObject* arguments, PyObject*) {
  return guard([&]() -> PyObject* {
    PyObject *shape, *coefficients, *times;
    int dtype, rounding, guidance, sum_first, deferred;
    Py_ssize_t slots, buffers;
    if (!PyArg_ParseTuple(arguments, "OiOOnniipp:Rows", &shape, &dtype, &coefficients, &times, &slots, &buffers,
                          &rounding, &guidance, &sum_first, &deferred)) {
      return nullptr;
    }
    auto rows = std::make_unique<Rows>(shape, dtype, coefficients, times, slots, buffers, rounding, guidance,
                                       sum_first != 0, deferred != 0);
    Object made(type->tp_alloc(type, 0));
    reinterpret_cast<RowsObject*>(made.get())->rows = rows.release();
    return made.release();
  });
}

void rows_dealloc(PyObject* object) {
  delete reinterpret_cast<RowsObject*>(object)->rows;
  PyTypeObject* const type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

// A method of Rows, with so many arguments.
template <Py_ssize_t kCount, auto kMethod>
PyObject* method(PyObject* object, PyObject* const* p, Py_ssize_t count) {
  return guard([&]() -> PyObject* {
    if (count != kCount) {
      return PyErr_Format(PyExc_TypeError, "this method of Rows takes %zd arguments, got %zd", kCount, count);
    }
    return kMethod(*reinterpret_cast<RowsObject*>(object)->rows, p);
  });
}

template <Py_ssize_t kCount, auto kMethod>
constexpr PyMethodDef define(const char* name, const char* documentation) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&method<kCount, kMethod>)), METH_FASTCALL,
          documentation};
}

PyMethodDef kMethods[] = {
    define<0, [](Rows& rows, PyObject* const*) { return rows.empty(); }>(
        "empty", "empty()\n--\n\nA tensor over fresh memory, which start() takes as it is."),
    define<1, [](Rows& rows, PyObject* const* p) { return rows.start(p[0]); }>(
        "start", "start(tensor)\n--\n\nThe state with a tensor's values; None where PyTorch has to copy it."),
    define<1, [](Rows& rows, PyObject* const* p) { return rows.tensor(p[0]); }>(
        "tensor", "tensor(state)\n--\n\nA tensor over the state's memory."),
    define<1, [](Rows& rows, PyObject* const* p) { return rows.time(integer(p[0])); }>(
        "time", "time(k)\n--\n\nThe k-th time, [B, 1, ..., 1]."),
    define<3, [](Rows& rows, PyObject* const* p) { return rows.evaluate(p[0], p[1], integer(p[2])); }>(
        "evaluate", "evaluate(step_fn, state, time)\n--\n\nstep_fn(x=state, t=the time of that number)"),
    define<2, [](Rows& rows, PyObject* const* p) { return PyBool_FromLong(rows.settle(p[0], p[1])); }>(
        "settle", "settle(state, x)\n--\n\nTakes x's values where it was given other memory; whether it was."),
    define<6, [](Rows& rows, PyObject* const* p) { return rows.step(p[0], p[1], p[2], p[3], integer(p[4]), p[5]); }>(
        "step",
        "step(state, base, v, u, row, evaluation)\n--\n\nThe next state; None where a velocity is no dense tensor."),
    define<1, [](Rows& rows, PyObject* const* p) { return rows.trajectory(p[0]); }>(
        "trajectory", "trajectory(state)\n--\n\nAll slots, state being the last that was reached."),
    define<0, [](Rows& rows, PyObject* const*) { return rows.slots(); }>(
        "slots", "slots()\n--\n\nThe trajectory as it is, [B, slots, *x_dims]."),
    define<0, [](Rows& rows, PyObject* const*) { return PyLong_FromLongLong(rows.slot()); }>(
        "slot", "slot()\n--\n\nThe slot of base."),
    define<1, [](Rows& rows, PyObject* const* p) { return rows.time_steps(integer(p[0])); }>(
        "time_steps", "time_steps(count)\n--\n\nA copy of the first times, [count]."),
    define<1, [](Rows& rows, PyObject* const* p) { return rows.history(integer(p[0])); }>(
        "history", "history(k)\n--\n\nA history buffer."),
    define<2, [](Rows& rows, PyObject* const* p) { return PyBool_FromLong(rows.owns(p[0], p[1])); }>(
        "owns", "owns(state, v)\n--\n\nWhether v lies in the state's memory."),
    {nullptr, nullptr, 0, nullptr}};

PyType_Slot kRowsSlots[] = {
    {Py_tp_new, reinterpret_cast<void*>(rows_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(rows_dealloc)},
    {Py_tp_methods, kMethods},
    {Py_tp_doc,
     const_cast<char*>("Rows(shape, dtype, coefficients, times, slots, buffers, rounding, guidance, sum_first, "
                       "deferred)\n--\n\nThe states of one sample() on the CPU, in memory that counts who holds it.")},
    {0, nullptr}};
PyType_Spec kRows = {"flowmatch_kernels._C.Rows", sizeof(RowsObject), 0, Py_TPFLAGS_DEFAULT, kRowsSlots};

PyType_Slot kStateSlots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(state_dealloc)}, {0, nullptr}};
PyType_Spec kState = {"flowmatch_kernels._C.State", sizeof(State), 0,
                      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, kStateSlots};

}  // namespace

void add_rows(pybind11::module_& m) {
  if (!exchange_api()) return;  // then flowmatch_kernels.rows.Fresh serves
  state_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&kState));
  if (!state_type) throw pybind11::error_already_set();
  m.attr("Rows") = pybind11::reinterpret_steal<pybind11::object>(PyType_FromSpec(&kRows));
}

}  // namespace flowmatch_kernels

#include "row.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>

#include "block_tensor.h"
#include "launch.h"
#include "python_type.h"
#include "table_rows.h"

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

// The states of one sample(), in memory that counts who holds it.
class Rows : public TableRows {
 public:
  Rows(PyObject* shape, int dtype, PyObject* coefficients, PyObject* times, Py_ssize_t slots, Py_ssize_t buffers,
       int rounding, int guidance, bool sum_first, PyObject* strength, bool deferred)
      : TableRows(checked(sizes(shape), slots), static_cast<Dtype>(dtype), View::kHost, coefficients, slots, rounding,
                  guidance, sum_first, strength),
        deferred_(deferred) {
    const View grid(times);
    if (!grid.seen || !grid.dtype) raise(PyExc_TypeError, "Rows: wanted times on the CPU");
    own_times_.assign(grid.shape + 1, grid.shape + grid.ndim);
    if (own_times_.size() > shape_.size() || !std::equal(own_times_.begin(), own_times_.end(), shape_.begin())) {
      raise(PyExc_ValueError, "Rows: wanted times of the first sizes of the state");
    }
    std::vector<std::int64_t> ones(shape_.size(), 1);
    std::copy(own_times_.begin(), own_times_.end(), ones.begin());
    time_ = Layout::contiguous(*grid.dtype, std::move(ones));
    times_size_ = time_.numel();
    if (own_times_.empty()) {
      time_.shape[0] = shape_[0];
      if (shape_[0] != 1) time_.strides[0] = 0;  // as expand makes it
    }
    x_ = Layout::contiguous(dtype_, shape_);
    times_count_ = grid.shape[0];
    times_ = take_memory(times_count_ * times_size_, *grid.dtype);
    std::memcpy(times_.memory(), grid.memory, times_count_ * times_size_ * size_of(*grid.dtype));
    if (slots) slots_memory_ = take_memory(numel_ * slots, dtype_);
    if (!deferred) trajectory_ = slots_memory_.memory();
    for (Py_ssize_t k = 0; k < buffers; ++k) {
      buffers_.push_back(take_memory(numel_, arithmetic_of(dtype_)));
      history_.push_back(buffers_.back().memory());
    }
  }

  // A tensor over fresh memory, which start() takes as it is.
  PyObject* empty() {
    empty_ = take_memory(numel_, dtype_);
    return tensor_over(empty_.get(), x_);
  }

  // The state that holds a tensor's values, as the new base; None for a tensor that has to be copied by PyTorch.
  PyObject* start(PyObject* tensor) {
    const View view(tensor);
    if (!fits(view) || view.dtype != dtype_ || !view.contiguous() || lazy(tensor)) Py_RETURN_NONE;
    Use block = empty_ && view.memory == empty_.memory() ? std::move(empty_) : Use();
    if (!block) {
      block = take_memory(numel_, dtype_);
      copy(block.memory(), static_cast<const char*>(view.memory), numel_ * size_of(dtype_));
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
    return tensor_over(times_.get(), time_, k * times_size_);
  }

  // v = step_fn(x=x, t=t), x and t being tensors of its own. A write to x is a write to the state.
  PyObject* evaluate(PyObject* step_fn, PyObject* state, Py_ssize_t k) {
    const Object x(tensor(state)), t(time(k));
    Object v(call(step_fn, x.get(), t.get()));
    const bool moved = settle(state, x.get());
    if (slots_ && at_base_ && (deferred_ || moved || version(x.get()) != 0)) keep(state);
    return v.release();
  }

  // A tensor over the state may have been replaced in place: x.data = y, x.share_memory_(), torch.utils.swap_tensors,
  // x.transpose_(). Its values count. Whether it was.
  bool settle(PyObject* state, PyObject* x) const {
    Block* const block = state_of(state).block.get();
    const View view(x);
    const bool fitting = view.seen && fits(view) && view.dtype == dtype_;
    if (fitting && view.memory == block->memory && view.contiguous()) return false;
    if (!fitting || (numel_ && !view.memory)) {
      raise(PyExc_ValueError,
            "x was replaced in place by a tensor of another shape, dtype or device: return a new tensor instead");
    }
    const Object values(dense(x));
    const View moved(values.get());
    Use fresh = take_memory(numel_, dtype_);
    copy(fresh.memory(), static_cast<const char*>(moved.memory), numel_ * size_of(dtype_));
    state_of(state).block = std::move(fresh);
    return true;
  }

  // The next state; None, with nothing written, where a velocity is no plain dense tensor of the state's shape.
  PyObject* step(PyObject* state, PyObject* base, PyObject* v, PyObject* u, std::int64_t number, PyObject* evaluation) {
    auto made = row(v, u, number, evaluation);
    if (!made) Py_RETURN_NONE;
    Object out(next(state, base, made->commit));
    took(*made);
    if (numel_ == 0) return out.release();
    Operands& o = made->operands;
    o.out = state_of(out.get()).block.memory();
    o.base = state_of(base).block.memory();
    std::optional<pybind11::gil_scoped_release> released;  // worth its cost only for a large state
    if (numel_ > grain(o)) released.emplace();
    launch_cpu(o, made->dtypes);
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
    std::vector<std::int64_t> shape = shape_;
    shape.insert(shape.begin() + 1, slots_);
    return tensor_over(slots_memory_.get(), Layout::contiguous(dtype_, std::move(shape)));
  }

  // [count], or with times of each sample or token [count, B] or [count, B, L].
  PyObject* time_steps(Py_ssize_t count) const {
    const Use copy = take_memory(count * times_size_, time_.dtype);
    std::memcpy(copy.memory(), times_.memory(), std::min(count, times_count_) * times_size_ * size_of(time_.dtype));
    std::vector<std::int64_t> shape{count};
    shape.insert(shape.end(), own_times_.begin(), own_times_.end());
    return tensor_over(copy.get(), Layout::contiguous(time_.dtype, std::move(shape)));
  }

  PyObject* history(Py_ssize_t k) const {
    return tensor_over(buffers_.at(k).get(), Layout::contiguous(arithmetic_of(dtype_), shape_));
  }

  // Whether v lies in the state's memory: it is x, or a view of it.
  bool owns(PyObject* state, PyObject* v) const {
    const View view(v);
    const char *const at = static_cast<char*>(view.memory), *const begin = state_of(state).block.memory();
    return view.seen && at >= begin && at < begin + numel_ * size_of(dtype_);
  }

 private:
  // Their product would overflow, and the tensor over them ends the process.
  static std::vector<std::int64_t> checked(std::vector<std::int64_t> sizes, std::int64_t slots) {
    if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return sizes;
    std::int64_t room = std::numeric_limits<std::int64_t>::max() / static_cast<std::int64_t>(sizeof(double));
    room /= std::max<std::int64_t>(slots, 1);
    for (const std::int64_t size : sizes) room /= size;
    if (room == 0) throw std::invalid_argument("batch_size and x_dims make states that are too large for any memory");
    return sizes;
  }

  static Use take_memory(std::int64_t numel, Dtype dtype) { return Use(take_block(numel * size_of(dtype))); }

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
    const std::int64_t bytes = sample_ * size_of(dtype_);
    const char* const from = state_of(state).block.memory();
    for (std::int64_t b = 0; b < shape_[0]; ++b) {
      copy(slots_memory_.memory() + (b * slots_ + slot_) * bytes, from + b * bytes, bytes);
    }
  }

  // Where the next state goes: memory that nobody else holds, in place if it may; base's, only where the step ends.
  PyObject* next(PyObject* state, PyObject* base, bool commit) const {
    if (commit && !held(state_of(base).block.get())) return Py_NewRef(base);
    if (state != base && !held(state_of(state).block.get())) return Py_NewRef(state);
    return make_state(take_memory(numel_, dtype_));
  }

  Layout x_, time_;
  Use times_, slots_memory_, empty_;
  std::vector<Use> buffers_;
  std::int64_t times_count_, times_size_;  // times, and numbers of each
  std::vector<std::int64_t> own_times_;    // the first sizes of the state that have times of their own
  bool deferred_;                          // slots are written after the model has seen the state, not by the step
};

// ---- the Python type ----

PyObject* rows_new(PyTypeObject* type, PyObject* arguments, PyObject*) {
  return guard([&]() -> PyObject* {
    PyObject *shape, *coefficients, *times, *strength;
    int dtype, rounding, guidance, sum_first, deferred;
    Py_ssize_t slots, buffers;
    if (!PyArg_ParseTuple(arguments, "OiOOnniipOp:Rows", &shape, &dtype, &coefficients, &times, &slots, &buffers,
                          &rounding, &guidance, &sum_first, &strength, &deferred)) {
      return nullptr;
    }
    auto rows = std::make_unique<Rows>(shape, dtype, coefficients, times, slots, buffers, rounding, guidance,
                                       sum_first != 0, strength, deferred != 0);
    return make(type, std::move(rows));
  });
}

PyMethodDef kMethods[] = {
    define<Rows, 0, [](Rows& rows, PyObject* const*) { return rows.empty(); }>(
        "empty", "empty()\n--\n\nA tensor over fresh memory, which start() takes as it is."),
    define<Rows, 1, [](Rows& rows, PyObject* const* p) { return rows.start(p[0]); }>(
        "start", "start(tensor)\n--\n\nThe state with a tensor's values; None where PyTorch has to copy it."),
    define<Rows, 1, [](Rows& rows, PyObject* const* p) { return rows.tensor(p[0]); }>(
        "tensor", "tensor(state)\n--\n\nA tensor over the state's memory."),
    define<Rows, 1, [](Rows& rows, PyObject* const* p) { return rows.time(integer(p[0])); }>(
        "time", "time(k)\n--\n\nThe k-th time, [B, 1, ..., 1]."),
    define<Rows, 3, [](Rows& rows, PyObject* const* p) { return rows.evaluate(p[0], p[1], integer(p[2])); }>(
        "evaluate", "evaluate(step_fn, state, time)\n--\n\nstep_fn(x=state, t=the time of that number)"),
    define<Rows, 2, [](Rows& rows, PyObject* const* p) { return PyBool_FromLong(rows.settle(p[0], p[1])); }>(
        "settle", "settle(state, x)\n--\n\nTakes x's values where it was given other memory; whether it was."),
    define<Rows, 6,
           [](Rows& rows, PyObject* const* p) { return rows.step(p[0], p[1], p[2], p[3], integer(p[4]), p[5]); }>(
        "step",
        "step(state, base, v, u, row, evaluation)\n--\n\nThe next state; None where a velocity is no dense tensor."),
    define<Rows, 1, [](Rows& rows, PyObject* const* p) { return rows.trajectory(p[0]); }>(
        "trajectory", "trajectory(state)\n--\n\nAll slots, state being the last that was reached."),
    define<Rows, 0, [](Rows& rows, PyObject* const*) { return rows.slots(); }>(
        "slots", "slots()\n--\n\nThe trajectory as it is, [B, slots, *x_dims]."),
    define<Rows, 0, [](Rows& rows, PyObject* const*) { return PyLong_FromLongLong(rows.slot()); }>(
        "slot", "slot()\n--\n\nThe slot of base."),
    define<Rows, 1, [](Rows& rows, PyObject* const* p) { return rows.time_steps(integer(p[0])); }>(
        "time_steps", "time_steps(count)\n--\n\nA copy of the first times, [count]."),
    define<Rows, 1, [](Rows& rows, PyObject* const* p) { return rows.history(integer(p[0])); }>(
        "history", "history(k)\n--\n\nA history buffer."),
    define<Rows, 2, [](Rows& rows, PyObject* const* p) { return drawn(rows, p); }>(
        "draw", "draw(k, keys)\n--\n\nRows that read history buffer k read the noise of these keys instead."),
    define<Rows, 2, [](Rows& rows, PyObject* const* p) { return PyBool_FromLong(rows.owns(p[0], p[1])); }>(
        "owns", "owns(state, v)\n--\n\nWhether v lies in the state's memory."),
    {nullptr, nullptr, 0, nullptr}};

PyType_Slot kStateSlots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(state_dealloc)}, {0, nullptr}};
PyType_Spec kState = {"flowmatch_kernels._C.State", sizeof(State), 0,
                      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, kStateSlots};

}  // namespace

void add_rows(pybind11::module_& m) {
  if (!exchange_api()) return;  // then flowmatch_kernels.rows.Fresh serves
  state_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&kState));
  if (!state_type) throw pybind11::error_already_set();
  m.attr("Rows") = pybind11::reinterpret_steal<pybind11::object>(
      type_of<Rows>("flowmatch_kernels._C.Rows", rows_new, kMethods,
                    "Rows(shape, dtype, coefficients, times, slots, buffers, rounding, guidance, sum_first, strength, "
                    "deferred)\n--\n\nThe states of one sample() on the CPU, in memory that counts who holds it."));
}

}  // namespace flowmatch_kernels

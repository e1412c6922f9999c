#include "direct_cpu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dlpack.h"

namespace flowmatch_kernels {
namespace {

// Elements below which a second thread costs more than it saves.
constexpr std::int64_t kGrain = 32768;

// ---- Python objects ----

struct PythonError {};  // Python's error indicator is set

class Object {  // a new reference
 public:
  explicit Object(PyObject* object) : object_(object) {
    if (!object) throw PythonError();
  }
  ~Object() { Py_XDECREF(object_); }
  Object(Object&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Object& operator=(Object&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

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

// Forgets an exception, but no KeyboardInterrupt or the like.
void clear_exception() {
  if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) throw PythonError();
  PyErr_Clear();
}

bool is(PyObject* tensor, PyObject* method) {
  const Object answer(PyObject_CallMethodNoArgs(tensor, method));
  return answer.get() == Py_True;
}

bool is_true(PyObject* tensor, PyObject* attribute) {
  const Object answer(PyObject_GetAttr(tensor, attribute));
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

// Runs f; a C++ exception becomes Python's.
template <class F>
PyObject* guard(F&& f) {
  try {
    return f();
  } catch (const PythonError&) {
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// ---- fused_step_cpu: one step, every operand given ----

constexpr const char* kParameters[] = {
    "out",      "base",       "v",    "u",      "h1", "h2", "h3", "coefficients", "row", "velocity_rounding",
    "guidance", "trajectory", "slot", "history"};
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
  kGuidance,
  kTrajectory,
  kSlot,
  kHistory,
  kParameterCount,
  kRequired = kVelocityRounding
};

// ops/reference.fused_step_ has the same signature.
PyObject* fused_step_cpu_python(PyObject*, PyObject* const* given, Py_ssize_t count, PyObject* names) {
  return guard([&]() -> PyObject* {
    PyObject* p[kParameterCount] = {};
    if (count > kParameterCount) {
      PyErr_Format(PyExc_TypeError, "fused_step_ takes 14 arguments, got %zd", count);
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
                     .slot = p[kSlot] ? integer(p[kSlot]) : 0,
                     .guidance = static_cast<Guidance>(p[kGuidance] ? integer(p[kGuidance]) : 0)};
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
  });
}

PyMethodDef kFusedStepCpu = {"fused_step_cpu",
                             reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fused_step_cpu_python)),
                             METH_FASTCALL | METH_KEYWORDS,
                             "fused_step_cpu(out, base, v, u, h1, h2, h3, coefficients, row, velocity_rounding=False, "
                             "guidance=0, trajectory=None, slot=0, history=None)\n--\n\n"
                             "fused_step_ on the CPU, as flowmatch_kernels.ops.reference.fused_step_. Only v and u may "
                             "be non-contiguous: each costs one copy. Shapes, devices, the row and the dtypes of "
                             "others than base and v are not checked."};

// ---- Stepper: the steps of one sample() ----

// What is torch's, looked up once, never released.
struct Torch {
  PyObject* tensor;                   // torch.Tensor
  const dlpack::ExchangeApi* dlpack;  // how to see into one
  PyObject* storage_use_count;        // torch._C._storage_Use_Count
  PyObject* keywords;                 // ("x", "t"), of a step_fn
  // Of a tensor that nobody else holds: uses of its storage, and references of the storage's Python object.
  std::int64_t uses;
  Py_ssize_t references;
};
Torch torch_;

// A tensor's memory, and who holds it.
class Buffer {
 public:
  Buffer(PyObject* tensor, const void* memory)
      : tensor_(Py_NewRef(tensor)), storage_(storage(tensor)), address_(address(storage_.get())), memory_(memory) {
    static PyObject* const is_shared = interned("is_shared");
    if (is(storage_.get(), is_shared)) memory_ = nullptr;
  }

  PyObject* tensor() const { return tensor_.get(); }
  // Uses of the storage: by tensors, views, arrays and graphs.
  std::int64_t uses() const {
    const Object count(PyObject_CallOneArg(torch_.storage_use_count, address_.get()));
    return integer(count.get());
  }
  Py_ssize_t references() const { return Py_REFCNT(storage_.get()); }
  bool shared() const { return !memory_; }  // with another process
  // Whether nobody but this one tensor holds the memory, which is at `now`: who shares it with another process from
  // here on, moves it.
  bool unheld(const void* now) const {
#ifdef Py_GIL_DISABLED
    return false;  // counts of references are not exact
#else
    return memory_ && now == memory_ && references() == torch_.references && uses() == torch_.uses;
#endif
  }

 private:
  static PyObject* storage(PyObject* tensor) {
    static PyObject* const untyped_storage = interned("untyped_storage");
    return PyObject_CallMethodNoArgs(tensor, untyped_storage);
  }
  static PyObject* address(PyObject* storage) {
    static PyObject* const cdata = interned("_cdata");
    return PyObject_GetAttr(storage, cdata);
  }

  Object tensor_, storage_, address_;
  const void* memory_;  // null where another process may hold it
};

std::int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// A tensor seen by way of DLPack.
struct View {
  dlpack::Tensor tensor;
  bool seen;  // torch can show it: not sparse, not nested, ...

  explicit View(PyObject* object) {
    seen = reinterpret_cast<PyObject*>(Py_TYPE(object)) == torch_.tensor &&
           torch_.dlpack->from_python(object, &tensor) == 0;
    if (!seen) clear_exception();
  }
  void* memory() const { return static_cast<char*>(tensor.data) + tensor.byte_offset; }
  std::optional<Dtype> dtype() const {
    if (tensor.code == dlpack::kBFloat && tensor.bits == 16) return Dtype::kBFloat16;
    if (tensor.code != dlpack::kFloat) return std::nullopt;
    switch (tensor.bits) {
      case 16:
        return Dtype::kFloat16;
      case 32:
        return Dtype::kFloat32;
      case 64:
        return Dtype::kFloat64;
      default:
        return std::nullopt;
    }
  }
  bool contiguous() const {
    std::int64_t stride = 1;
    for (int d = tensor.ndim - 1; d >= 0; --d) {
      if (tensor.shape[d] != 1 && tensor.strides[d] != stride) return false;
      stride *= tensor.shape[d];
    }
    return true;
  }
};

// Where a state's memory is now: a step_fn may have moved it.
void* memory_of(PyObject* state) {
  const View view(state);
  if (!view.seen || !view.memory()) {
    PyErr_SetString(PyExc_ValueError, "fused_step: a state has no memory any more (was its storage resized?)");
    throw PythonError();
  }
  return view.memory();
}

// A function of flowmatch_kernels.sampling. Not kept in a static: importing may give up the GIL.
Object sampling(const char* name) {
  return Object(pybind11::object(pybind11::module_::import("flowmatch_kernels.sampling").attr(name)).release().ptr());
}

// How often a tensor was written to, as far as PyTorch counts it.
std::int64_t version(PyObject* tensor) {
  static PyObject* const name = interned("_version");
  PyObject* const value = PyObject_GetAttr(tensor, name);
  if (!value) {  // an inference tensor counts nothing
    clear_exception();
    return 0;
  }
  return integer(Object(value).get());
}

// As flowmatch_kernels.sampling.Stepper, with the same names; and it decides which memory each new state is written to.
// Fresh memory is the main cost of a large state on the CPU: a buffer is written again, but only when nobody can tell.
class Stepper {
 public:
  Stepper(PyObject* velocities, PyObject* state, PyObject* coefficients, PyObject* trajectory, bool write_slots)
      : velocities_(Py_NewRef(velocities)), coefficients_(Py_NewRef(coefficients)), trajectory_(Py_NewRef(trajectory)) {
    const View view(state);
    if (!view.seen || !view.dtype()) {
      PyErr_SetString(PyExc_TypeError, "Stepper: the state is no plain tensor");
      throw PythonError();
    }
    state_ = *view.dtype();
    shape_.assign(view.tensor.shape, view.tensor.shape + view.tensor.ndim);
    numel_ = 1;
    for (const std::int64_t size : shape_) numel_ *= size;
    if (numel_) current_.emplace(state, view.memory());
    rows_ = static_cast<char*>(memory(coefficients));
    if (trajectory != Py_None && numel_) {
      slots_ = size(trajectory, 1), sample_ = numel_ / shape_[0];
      char* const slots_memory = static_cast<char*>(memory(trajectory));
      const std::int64_t bytes = sample_ * size_of(state_);
      for (std::int64_t b = 0; b < shape_[0]; ++b) {  // slot 0
        std::memcpy(slots_memory + b * slots_ * bytes, static_cast<char*>(view.memory()) + b * bytes, bytes);
      }
      if (write_slots) slots_memory_ = slots_memory;
    }
    static PyObject* const names[] = {interned("guidance"), interned("guided"), interned("skip"),
                                      interned("unguided_step_fn"), interned("step_fn")};
    const Object guidance(PyObject_GetAttr(velocities, names[0])), guided(PyObject_GetAttr(velocities, names[1]));
    guidance_ = static_cast<Guidance>(integer(guidance.get()));
    guided_ = guided.get() != Py_None;
    if (guided_) {
      const Object skip(PyObject_GetAttr(guided.get(), names[2]));
      unguided_step_fn_.emplace(PyObject_GetAttr(guided.get(), names[3]));
      direct_ = !truth(skip.get()) && unguided_step_fn_->get() != Py_None;
    }
    step_fn_.emplace(PyObject_GetAttr(velocities, names[4]));
  }

  // `evaluation` is flowmatch_kernels.solvers.Evaluation, `slot` that of base.
  PyObject* step(PyObject* state, PyObject* base, PyObject* times, PyObject* row, PyObject* evaluation,
                 std::int64_t slot, PyObject* history) {
    const auto field = [&](Py_ssize_t k) { return PyTuple_GET_ITEM(evaluation, k); };
    const bool commit = truth(field(1));
    const Object t(PySequence_GetItem(times, integer(field(0))));
    const auto place = [&](PyObject* number) { return Object(PySequence_GetItem(history, integer(number))); };
    const void* h[3] = {};
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(field(2)); ++k) {
      h[k] = memory(place(PyTuple_GET_ITEM(field(2), k)).get());
    }
    void* const remembered = field(3) == Py_None ? nullptr : memory(place(field(3)).get());
    static PyObject* const shaped = interned("shaped");
    bool wrote = false;
    Pair pair = evaluate(state, t.get(), row, trajectory_.get() != Py_None && state == base ? &wrote : nullptr);
    if (wrote) {
      const Object number(PyLong_FromLongLong(slot));
      PyObject* const arguments[] = {trajectory_.get(), number.get(), state};
      const Object done(PyObject_Vectorcall(sampling("rewrite").get(), arguments, 3, nullptr));
    }
    std::optional<Given> given = fit(pair);
    if (!given) {
      PyObject* const arguments[] = {velocities_.get(), pair.v.get(), pair.u.get(), row};
      Object both(PyObject_VectorcallMethod(shaped, arguments, 4, nullptr));
      pair = Pair::of(both.get());
      given = fit(pair);
      if (!given) {
        left_ = std::move(both);
        Py_RETURN_NONE;
      }
    }
    if (numel_ == 0) return Py_NewRef(state);
    void* const base_memory = memory_of(base);
    void* const state_memory = state == base ? base_memory : memory_of(state);
    Object out(next(state, state_memory, base, base_memory, commit));
    const std::int64_t row_bytes = kColumns * (state_ == Dtype::kFloat64 ? 8 : 4);
    const Operands o{.out = out.get() == state ? state_memory : memory_of(out.get()),
                     .base = base_memory,
                     .v = given->v,
                     .u = given->u,
                     .h = {h[0], h[1], h[2]},
                     .row = rows_ + integer(row) * row_bytes,
                     .trajectory = commit ? slots_memory_ : nullptr,
                     .history = remembered,
                     .numel = numel_,
                     .sample = sample_,
                     .slots = slots_,
                     .slot = slot + commit,
                     .guidance = guidance_};
    {
      std::optional<pybind11::gil_scoped_release> released;  // worth its cost only for a large state
      if (numel_ > kGrain) released.emplace();
      run_cpu(o, state_, given->dtype, false);
    }
    return out.release();
  }

  PyObject* left() const { return Py_NewRef(left_ ? left_->get() : Py_None); }

 private:
  struct Pair {  // u may be None
    Object v, u;
    static Pair of(PyObject* tuple) {
      PyObject *v, *u;
      if (!PyArg_ParseTuple(tuple, "OO", &v, &u)) throw PythonError();
      return {Object(Py_NewRef(v)), Object(Py_NewRef(u))};
    }
  };
  struct Given {  // dense velocities
    const void* v;
    const void* u;
    Dtype dtype;
    std::optional<Object> copies[2];  // where one was not dense
  };

  // Calls a model with a tensor object of its own for the state's memory: x.data, cheaper than detach, which counts
  // the writes to x by itself. Sets `wrote` where it is asked for and the model wrote to x. A new reference.
  static PyObject* call(PyObject* model, PyObject* state, PyObject* t, bool* wrote) {
    static PyObject* const data = interned("data");
    const Object x(PyObject_GetAttr(state, data));
    PyObject* arguments[] = {nullptr, x.get(), t};
    Object v(PyObject_Vectorcall(model, arguments + 1, PY_VECTORCALL_ARGUMENTS_OFFSET, torch_.keywords));
    if (wrote) *wrote = *wrote || version(x.get()) != 0;
    return v.release();
  }

  // What velocities(state, t, row) gives; mostly without a call of it.
  Pair evaluate(PyObject* state, PyObject* t, PyObject* row, bool* wrote) {
    if (!guided_) return {Object(call(step_fn_->get(), state, t, wrote)), Object(Py_NewRef(Py_None))};
    if (direct_) {
      Object v(call(step_fn_->get(), state, t, wrote));
      const std::int64_t before = version(v.get());
      std::optional<Object> copy;
      if (shared_) copy = copy_of(v.get(), state);
      Object u(call(unguided_step_fn_->get(), state, t, wrote));
      if (version(v.get()) == before && apart(v.get(), u.get())) {
        shared_ = false;
      } else {
        static PyObject* const met = interned("met");
        const Object number(PyLong_FromLongLong(before));
        PyObject* const arguments[] = {velocities_.get(), v.get(), u.get(),
                                       number.get(),      state,   shared_ ? Py_True : Py_False};
        const Object answer(PyObject_VectorcallMethod(met, arguments, 6, nullptr));
        shared_ = truth(answer.get());
      }
      return {copy ? std::move(*copy) : std::move(v), std::move(u)};
    }
    const std::int64_t before = wrote ? version(state) : 0;
    PyObject* const arguments[] = {state, t, row};
    const Object pair(PyObject_Vectorcall(velocities_.get(), arguments, 3, nullptr));
    if (wrote) *wrote = *wrote || version(state) != before;
    return Pair::of(pair.get());
  }

  // v's clone, as long as the next model may write to v; none of x itself, or a view of it, to which it may.
  std::optional<Object> copy_of(PyObject* v, PyObject* state) const {
    static PyObject* const clone = interned("clone");
    if (numel_ == 0) return std::nullopt;
    const View view(v);
    if (view.seen) {
      const char* const begin = static_cast<char*>(memory_of(state));
      const char* const at = static_cast<char*>(view.memory());
      if (at >= begin && at < begin + numel_ * size_of(state_)) return std::nullopt;
    } else {
      const int tensor = PyObject_IsInstance(v, torch_.tensor);
      if (tensor < 0) throw PythonError();
      if (!tensor) return std::nullopt;
    }
    return Object(PyObject_CallMethodNoArgs(v, clone));
  }

  // Two tensors with memory at different addresses.
  static bool apart(PyObject* v, PyObject* u) {
    const View first(v), second(u);
    return first.seen && second.seen && first.memory() != second.memory();
  }

  // Whether a velocity is a plain tensor of the state's shape, on the CPU, of a dtype that does not widen the state.
  bool fits(const View& v) const {
    if (!v.seen || v.tensor.device_type != dlpack::kCpu || v.tensor.ndim != static_cast<int>(shape_.size()))
      return false;
    if (!std::equal(shape_.begin(), shape_.end(), v.tensor.shape)) return false;
    const std::optional<Dtype> dtype = v.dtype();
    return dtype && dispatch(state_, *dtype, false, [](auto) {});
  }

  // The velocities as the kernel takes them, or nothing, where it cannot.
  std::optional<Given> fit(const Pair& pair) const {
    const View v(pair.v.get());
    if (!fits(v)) return std::nullopt;
    std::optional<Given> given(std::in_place);
    given->dtype = *v.dtype();
    given->v = dense(pair.v.get(), v, given->copies[0]);
    given->u = nullptr;
    if (pair.u.get() != Py_None) {
      const View u(pair.u.get());
      if (!fits(u) || *u.dtype() != given->dtype) return std::nullopt;
      given->u = dense(pair.u.get(), u, given->copies[1]);
    }
    if (numel_ && (!given->v || (pair.u.get() != Py_None && !given->u))) {
      PyErr_SetString(PyExc_ValueError, "fused_step: a velocity has no memory (a wrapped tensor, a storage resized?)");
      throw PythonError();
    }
    return given;
  }
  static const void* dense(PyObject* v, const View& view, std::optional<Object>& copy) {
    static PyObject* const is_neg = interned("is_neg");
    static PyObject* const is_zerotensor = interned("_is_zerotensor");
    if (view.contiguous() && !is(v, is_neg) && !is(v, is_zerotensor)) return view.memory();
    copy.emplace(flowmatch_kernels::dense(v));
    return memory(copy->get());
  }

  // A tensor for the next state, perhaps `state` itself; not `base` while the step goes on. A new reference.
  PyObject* next(PyObject* state, void* state_memory, PyObject* base, void* base_memory, bool commit) {
    if (!current_ || current_->tensor() != state) current_.emplace(state, state_memory);
    std::optional<Buffer> out;
    if ((commit || state != base) && current_->unheld(state_memory)) {
      if (commit && state != base) {
        spare_.emplace(base, base_memory);
      } else {
        spare_.reset();
      }
      return Py_NewRef(state);
    }
    if (spare_ && spare_->unheld(memory_of(spare_->tensor()))) {
      out.emplace(std::move(*spare_));
    } else {
      const Object made(PyObject_CallOneArg(sampling("fresh").get(), state));
      out.emplace(made.get(), memory_of(made.get()));
    }
    spare_.reset();
    if (commit) {
      state == base ? spare_.emplace(std::move(*current_)) : spare_.emplace(base, base_memory);
    }
    current_.emplace(std::move(*out));
    return Py_NewRef(current_->tensor());
  }

  Object velocities_, coefficients_, trajectory_;
  std::optional<Object> step_fn_, unguided_step_fn_, left_;
  std::vector<std::int64_t> shape_;
  std::optional<Buffer> current_, spare_;
  Dtype state_;
  Guidance guidance_;
  bool guided_ = false;
  bool direct_ = false;  // two models, both called at every row
  bool shared_ = true;   // in one buffer, as far as is known: Velocities.shared
  std::int64_t numel_;
  std::int64_t sample_ = 1;
  std::int64_t slots_ = 1;
  char* rows_;
  void* slots_memory_ = nullptr;
};

struct StepperObject {
  PyObject_HEAD;
  Stepper* stepper;
};

PyObject* stepper_new(PyTypeObject* type, PyObject* arguments, PyObject*) {
  return guard([&]() -> PyObject* {
    PyObject *fused_step, *velocities, *state, *coefficients, *trajectory;
    int write_slots;
    if (!PyArg_ParseTuple(arguments, "OOOOOp:Stepper", &fused_step, &velocities, &state, &coefficients, &trajectory,
                          &write_slots)) {
      return nullptr;
    }
    Object made(type->tp_alloc(type, 0));
    reinterpret_cast<StepperObject*>(made.get())->stepper =
        new Stepper(velocities, state, coefficients, trajectory, write_slots);
    return made.release();
  });
}

void stepper_dealloc(PyObject* object) {
  delete reinterpret_cast<StepperObject*>(object)->stepper;
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

PyObject* stepper_step(PyObject* object, PyObject* const* p, Py_ssize_t count) {
  return guard([&]() -> PyObject* {
    if (count != 7 || !PyTuple_Check(p[4]) || PyTuple_GET_SIZE(p[4]) != 4 ||
        !PyTuple_Check(PyTuple_GET_ITEM(p[4], 2)) || PyTuple_GET_SIZE(PyTuple_GET_ITEM(p[4], 2)) > 3) {
      return PyErr_Format(PyExc_TypeError, "step takes 7 arguments, the fifth an Evaluation");
    }
    Stepper& stepper = *reinterpret_cast<StepperObject*>(object)->stepper;
    return stepper.step(p[0], p[1], p[2], p[3], p[4], integer(p[5]), p[6]);
  });
}

PyMethodDef kStepperMethods[] = {
    {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(stepper_step)), METH_FASTCALL,
     "step(state, base, times, row, evaluation, slot, history)\n--\n\n"
     "As flowmatch_kernels.sampling.Stepper.step."},
    {nullptr, nullptr, 0, nullptr}};

PyGetSetDef kStepperAttributes[] = {
    {"left", [](PyObject* object, void*) { return reinterpret_cast<StepperObject*>(object)->stepper->left(); }, nullptr,
     "After a step that was not taken: the velocities.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyType_Slot kStepperSlots[] = {
    {Py_tp_new, reinterpret_cast<void*>(stepper_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(stepper_dealloc)},
    {Py_tp_methods, kStepperMethods},
    {Py_tp_getset, kStepperAttributes},
    {Py_tp_doc,
     const_cast<char*>("Stepper(fused_step_, velocities, state, coefficients, trajectory, write_slots)\n--\n\n"
                       "flowmatch_kernels.sampling.Stepper on the CPU, which writes memory again that "
                       "nobody else holds.")},
    {0, nullptr}};

// Whether a clock is as it was made: its times are the original's, and of its views nobody holds one, or its memory, or
// has left a mark on it.
PyObject* untouched(PyObject*, PyObject* const* p, Py_ssize_t count) {
  return guard([&]() -> PyObject* {
    if (count != 6 || !PyTuple_Check(p[2])) {
      return PyErr_Format(PyExc_TypeError,
                          "untouched takes times, original, views (a tuple), batch_size, dims and uses");
    }
    static PyObject* const requires_grad = interned("requires_grad");
    static PyObject* const grad = interned("grad");
    const View times(p[0]), original(p[1]);
    const std::int64_t batch_size = integer(p[3]), dims = integer(p[4]), bytes = times.seen ? times.tensor.bits / 8 : 0;
    if (!times.seen || !original.seen || times.tensor.shape[0] != original.tensor.shape[0] ||
        std::memcmp(times.memory(), original.memory(), original.tensor.shape[0] * bytes) != 0) {
      Py_RETURN_FALSE;
    }
    const Buffer buffer(p[0], times.memory());
    if (buffer.shared() || buffer.references() != torch_.references || buffer.uses() != integer(p[5])) Py_RETURN_FALSE;
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(p[2]); ++k) {
      PyObject* const view = PyTuple_GET_ITEM(p[2], k);
      PyObject** const attributes = _PyObject_GetDictPtr(view);
      const Object gradient(PyObject_GetAttr(view, grad));
      const bool marked = is_true(view, requires_grad) || gradient.get() != Py_None ||
                          (attributes && *attributes && PyDict_Size(*attributes));
      const View t(view);
      bool same = t.seen && t.memory() == static_cast<char*>(times.memory()) + k * bytes && t.tensor.ndim == dims + 1 &&
                  t.tensor.shape[0] == batch_size && (batch_size < 2 || t.tensor.strides[0] == 0);
      for (int d = 1; same && d < t.tensor.ndim; ++d) same = t.tensor.shape[d] == 1;
      if (Py_REFCNT(view) != 1 || marked || !same) Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
  });
}

PyMethodDef kUntouched = {
    "untouched", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(untouched)), METH_FASTCALL,
    "untouched(times, original, views, batch_size, dims, uses)\n--\n\nFor flowmatch_kernels.sampling.Clock."};

PyType_Spec kStepper = {"flowmatch_kernels._C.Stepper", sizeof(StepperObject), 0, Py_TPFLAGS_DEFAULT, kStepperSlots};

}  // namespace

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

void add_direct_cpu(pybind11::module_& m) {
  const auto torch = pybind11::module_::import("torch");
  const char* const names[] = {"float32", "float64", "bfloat16", "float16"};
  for (int k = 0; k < 4; ++k) torch_dtypes[k] = pybind11::object(torch.attr(names[k])).release().ptr();
  // Without any of these the loop's own Stepper serves.
  const pybind11::object tensor = torch.attr("Tensor"), internals = torch.attr("_C");
  if (pybind11::hasattr(tensor, dlpack::kAttribute) && pybind11::hasattr(internals, "_storage_Use_Count")) {
    const pybind11::object capsule = tensor.attr(dlpack::kAttribute);
    auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
    if (!api) throw pybind11::error_already_set();
    if (api->major == dlpack::kMajor && api->from_python) {
      torch_.tensor = pybind11::object(tensor).release().ptr();
      torch_.dlpack = api;
      torch_.keywords = pybind11::make_tuple("x", "t").release().ptr();
      torch_.storage_use_count = pybind11::object(internals.attr("_storage_Use_Count")).release().ptr();
      const pybind11::object own = torch.attr("empty")(1, pybind11::arg("device") = "cpu");
      const Buffer buffer(own.ptr(), nullptr);
      torch_.uses = buffer.uses(), torch_.references = buffer.references();
#ifndef Py_GIL_DISABLED  // counts of references are not exact there
      m.attr("untouched") =
          pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&kUntouched, nullptr, nullptr));
#endif
      m.attr("Stepper") = pybind11::reinterpret_steal<pybind11::object>(PyType_FromSpec(&kStepper));
    }
  }
  m.attr("fused_step_cpu") =
      pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&kFusedStepCpu, nullptr, nullptr));
}
}  // namespace flowmatch_kernels

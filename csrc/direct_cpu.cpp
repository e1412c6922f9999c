#include "direct_cpu.h"

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <utility>

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
PyObject* fused_step_cpu_python(PyObject*, PyObject* const* given, Py_ssize_t count, PyObject* names) try {
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
                             "guidance=0, trajectory=None, slot=0, history=None)\n--\n\n"
                             "fused_step_ on the CPU, as flowmatch_kernels.ops.reference.fused_step_. Only v and u may "
                             "be non-contiguous: each costs one copy. Shapes, devices, the row and the dtypes of "
                             "others than base and v are not checked."};

// ---- Stepper: the steps of one sample() ----

// Objects of torch's, looked up once, never released.
struct Torch {
  PyObject* tensor;             // torch.Tensor
  PyObject* strided;            // torch.strided
  PyObject* storage_use_count;  // torch._C._storage_Use_Count; null where this torch has none
  // Uses of the storage of a tensor that nobody else holds, and references of the storage's Python object.
  std::int64_t uses = 0;
  Py_ssize_t references = 0;
};
Torch torch_;

struct Holders {
  std::int64_t uses;
  Py_ssize_t references;
  bool shared;  // with another process
};

// Who holds a tensor's memory.
Holders holders(PyObject* tensor) {
  static PyObject* const untyped_storage = interned("untyped_storage");
  static PyObject* const cdata = interned("_cdata");
  static PyObject* const is_shared = interned("is_shared");
  const Object storage(PyObject_CallMethodNoArgs(tensor, untyped_storage));
  const Object address(PyObject_GetAttr(storage.get(), cdata));
  const Object uses(PyObject_CallOneArg(torch_.storage_use_count, address.get()));
  return {integer(uses.get()), Py_REFCNT(storage.get()), is(storage.get(), is_shared)};
}

// Whether no tensor, storage object, array, view or graph but this one tensor holds its memory.
bool unheld(PyObject* tensor) {
#ifdef Py_GIL_DISABLED
  return false;  // counts of references are not exact
#else
  if (!torch_.storage_use_count) return false;
  const Holders who = holders(tensor);
  return who.uses == torch_.uses && who.references == torch_.references && !who.shared;
#endif
}

// As flowmatch_kernels.sampling.Stepper, with the same names; and it decides which memory each new state is written to.
// Fresh memory is the main cost of a large state on the CPU: a buffer is written again, but only when nobody can tell.
struct Stepper {
  PyObject_HEAD;
  PyObject* velocities;
  PyObject* step_fn;           // called from here where there is no guidance, or
  PyObject* unguided_step_fn;  // this one too, and nothing is skipped; else null
  PyObject* shape;
  PyObject* coefficients;
  PyObject* trajectory;  // or None
  PyObject* spare;       // a former state, or null
  PyObject* left;        // (v, u) of a step that was not taken
  bool guided;
  bool shared;  // as Velocities.shared
  Dtype state;
  Guidance guidance;
  std::int64_t numel;
  std::int64_t sample;
  std::int64_t slots;
  char* rows;
  void* slots_memory;  // null where slots are not written here
};

PyObject* attribute(PyObject* object, const char* name) {
  PyObject* value = PyObject_GetAttrString(object, name);
  if (!value) throw PythonError();
  return value;
}

PyObject* stepper_new(PyTypeObject* type, PyObject* arguments, PyObject*) try {
  PyObject *fused_step, *velocities, *state, *coefficients, *trajectory;
  int write_slots;
  if (!PyArg_ParseTuple(arguments, "OOOOOp:Stepper", &fused_step, &velocities, &state, &coefficients, &trajectory,
                        &write_slots)) {
    return nullptr;
  }
  const Object made(type->tp_alloc(type, 0));
  Stepper* self = reinterpret_cast<Stepper*>(made.get());
  self->velocities = Py_NewRef(velocities);
  self->coefficients = Py_NewRef(coefficients);
  self->trajectory = Py_NewRef(trajectory);
  self->shape = attribute(velocities, "shape");
  const Object guidance(attribute(velocities, "guidance"));
  self->guidance = static_cast<Guidance>(integer(guidance.get()));
  const Object guided(attribute(velocities, "guided"));
  self->guided = guided.get() != Py_None;
  self->shared = true;
  bool direct = !self->guided;
  if (self->guided) {
    const Object skip(attribute(guided.get(), "skip"));
    self->unguided_step_fn = attribute(guided.get(), "unguided_step_fn");
    direct = !truth(skip.get()) && self->unguided_step_fn != Py_None;
  }
  if (direct) self->step_fn = attribute(velocities, "step_fn");
  static PyObject* const numel_name = interned("numel");
  const Object numel(PyObject_CallMethodNoArgs(state, numel_name));
  self->state = python_dtype(state);
  self->numel = integer(numel.get());
  self->rows = static_cast<char*>(memory(coefficients));
  self->slots_memory = write_slots ? memory(trajectory) : nullptr;
  self->slots = trajectory == Py_None ? 1 : size(trajectory, 1);
  self->sample = trajectory == Py_None || self->numel == 0 ? self->numel : self->numel / size(state, 0);
  return Py_NewRef(made.get());
} catch (const PythonError&) {
  return nullptr;
}

void stepper_dealloc(PyObject* object) {
  Stepper* self = reinterpret_cast<Stepper*>(object);
  for (PyObject* held : {self->velocities, self->step_fn, self->unguided_step_fn, self->shape, self->coefficients,
                         self->trajectory, self->spare, self->left}) {
    Py_XDECREF(held);
  }
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

// Whether an attribute of a tensor is this very object; no, where it cannot be asked.
bool has(PyObject* tensor, PyObject* name, PyObject* wanted) {
  PyObject* const value = PyObject_GetAttr(tensor, name);
  if (!value) PyErr_Clear();
  Py_XDECREF(value);
  return value == wanted;
}

// Whether a velocity is a plain tensor of the state's shape, on the CPU, of a dtype that does not widen the state.
bool fits(const Stepper& self, PyObject* v) {
  static PyObject* const layout = interned("layout");
  static PyObject* const is_cpu = interned("is_cpu");
  static PyObject* const shape = interned("shape");
  static PyObject* const dtype = interned("dtype");
  if (reinterpret_cast<PyObject*>(Py_TYPE(v)) != torch_.tensor || !has(v, layout, torch_.strided) ||
      !has(v, is_cpu, Py_True)) {
    return false;
  }
  PyObject* const size = PyObject_GetAttr(v, shape);
  if (!size) {  // a nested tensor has none
    PyErr_Clear();
    return false;
  }
  const int equal = PyObject_RichCompareBool(size, self.shape, Py_EQ);
  Py_DECREF(size);
  if (equal < 0) throw PythonError();
  const Object of(PyObject_GetAttr(v, dtype));
  for (int k = 0; equal && k < 4; ++k) {
    if (of.get() == torch_dtypes[k]) return dispatch(self.state, static_cast<Dtype>(k), false, [](auto) {});
  }
  return false;
}

// Whether the kernel can take these velocities, which are of one dtype where there are two.
bool fit(const Stepper& self, PyObject* v, PyObject* u) {
  return fits(self, v) && (u == Py_None || (fits(self, u) && python_dtype(u) == python_dtype(v)));
}

// How often a tensor was written to, as far as PyTorch counts it.
std::int64_t version(PyObject* tensor) {
  static PyObject* const name = interned("_version");
  PyObject* const value = PyObject_GetAttr(tensor, name);
  if (!value) {  // an inference tensor counts nothing
    PyErr_Clear();
    return 0;
  }
  return integer(Object(value).get());
}

// Two tensors with memory of different addresses.
bool apart(PyObject* v, PyObject* u) {
  for (PyObject* tensor : {v, u}) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != torch_.tensor) return false;
  }
  try {
    return memory(v) != memory(u);
  } catch (const PythonError&) {  // sparse
    PyErr_Clear();
    return false;
  }
}

// Calls a model with a tensor object of its own for the state's memory: x.data, cheaper than detach, which counts the
// writes to x by itself. Sets `wrote` where it is asked for and the model wrote to x. A new reference.
PyObject* evaluate(PyObject* model, PyObject* state, PyObject* t, bool* wrote) {
  static PyObject* const data = interned("data");
  static PyObject* const names = PyTuple_Pack(2, interned("x"), interned("t"));
  const Object x(PyObject_GetAttr(state, data));
  const std::int64_t before = wrote ? version(x.get()) : 0;
  PyObject* arguments[] = {nullptr, x.get(), t};
  PyObject* const v = PyObject_Vectorcall(model, arguments + 1, PY_VECTORCALL_ARGUMENTS_OFFSET, names);
  if (!v) throw PythonError();
  if (wrote) *wrote = *wrote || version(x.get()) != before;
  return v;
}

struct Pair {  // references of its own; u may be None
  Object v;
  Object u;
};

// (v, u), as velocities(state, t, row) gives them.
Pair evaluate(Stepper& self, PyObject* state, PyObject* t, PyObject* row, bool* wrote) {
  static PyObject* const met = interned("met");
  static PyObject* const shared = interned("shared");
  const auto ask = [&] {
    const Object answer(PyObject_GetAttr(self.velocities, shared));
    self.shared = truth(answer.get());
  };
  if (self.step_fn && !self.guided)
    return {Object(evaluate(self.step_fn, state, t, wrote)), Object(Py_NewRef(Py_None))};
  if (self.step_fn && !self.shared) {
    Object v(evaluate(self.step_fn, state, t, wrote));
    const std::int64_t before = version(v.get());
    Object u(evaluate(self.unguided_step_fn, state, t, wrote));
    if (!apart(v.get(), u.get()) || version(v.get()) != before) {
      const Object number(PyLong_FromLongLong(before));
      PyObject* const arguments[] = {self.velocities, v.get(), u.get(), number.get(), state};
      const Object judged(PyObject_VectorcallMethod(met, arguments, 5, nullptr));
      ask();
    }
    return {std::move(v), std::move(u)};
  }
  const std::int64_t before = wrote ? version(state) : 0;
  PyObject* const arguments[] = {state, t, row};
  const Object pair(PyObject_Vectorcall(self.velocities, arguments, 3, nullptr));
  if (wrote) *wrote = *wrote || version(state) != before;
  ask();
  PyObject *v, *u;
  if (!PyArg_ParseTuple(pair.get(), "OO", &v, &u)) throw PythonError();
  return {Object(Py_NewRef(v)), Object(Py_NewRef(u))};
}

// A function of flowmatch_kernels.sampling; never released.
PyObject* sampling(const char* name) {
  return pybind11::object(pybind11::module_::import("flowmatch_kernels.sampling").attr(name)).release().ptr();
}

// A tensor for the next state, perhaps `state` itself; not `base` while the step goes on. A new reference.
PyObject* next_state(Stepper& self, PyObject* state, PyObject* base, bool commit) {
  static PyObject* const fresh = sampling("fresh");
  PyObject* out = nullptr;
  if ((commit || state != base) && unheld(state)) {
    out = Py_NewRef(state);
  } else if (self.spare && unheld(self.spare)) {
    out = Py_NewRef(self.spare);
  } else {
    out = PyObject_CallOneArg(fresh, state);
    if (!out) throw PythonError();
  }
  PyObject* const former = self.spare;
  self.spare = commit && out != base ? Py_NewRef(base) : nullptr;
  Py_XDECREF(former);
  return out;
}

PyObject* stepper_step(PyObject* object, PyObject* const* p, Py_ssize_t count) try {
  static PyObject* const shaped = interned("shaped");
  static PyObject* const rewrite = sampling("rewrite");
  enum { kState, kBase, kT, kH1, kH2, kH3, kRow, kCommit, kSlot, kHistory, kCount };
  if (count != kCount) {
    PyErr_Format(PyExc_TypeError, "step takes %d arguments, got %zd", static_cast<int>(kCount), count);
    return nullptr;
  }
  Stepper& self = *reinterpret_cast<Stepper*>(object);
  PyObject *const state = p[kState], *const base = p[kBase];
  const bool commit = truth(p[kCommit]), slots = self.trajectory != Py_None;
  const std::int64_t slot = integer(p[kSlot]);
  bool wrote = false;
  Pair pair = evaluate(self, state, p[kT], p[kRow], slots && state == base ? &wrote : nullptr);
  if (wrote) {
    const Object number(PyLong_FromLongLong(slot - commit));
    PyObject* const arguments[] = {self.trajectory, number.get(), state};
    const Object done(PyObject_Vectorcall(rewrite, arguments, 3, nullptr));
  }
  if (!fit(self, pair.v.get(), pair.u.get())) {
    PyObject* const arguments[] = {self.velocities, pair.v.get(), pair.u.get(), p[kRow]};
    Object both(PyObject_VectorcallMethod(shaped, arguments, 4, nullptr));
    PyObject *v, *u;
    if (!PyArg_ParseTuple(both.get(), "OO", &v, &u)) return nullptr;
    if (!fit(self, v, u)) {
      Py_XDECREF(self.left);
      self.left = Py_NewRef(both.get());
      Py_RETURN_NONE;
    }
    pair = {Object(Py_NewRef(v)), Object(Py_NewRef(u))};
  }
  Object out(next_state(self, state, base, commit));
  if (self.numel == 0) return out.release();

  const Object v(dense(pair.v.get()));
  const Object u(pair.u.get() == Py_None ? Py_NewRef(Py_None) : dense(pair.u.get()));
  const std::int64_t row_bytes = kColumns * (self.state == Dtype::kFloat64 ? 8 : 4);
  void* const written = memory(out.get());
  const Operands o{.out = written,
                   .base = base == out.get() ? written : memory(base),
                   .v = memory(v.get()),
                   .u = memory(u.get()),
                   .h = {memory(p[kH1]), memory(p[kH2]), memory(p[kH3])},
                   .row = self.rows + integer(p[kRow]) * row_bytes,
                   .trajectory = commit ? self.slots_memory : nullptr,
                   .history = memory(p[kHistory]),
                   .numel = self.numel,
                   .sample = self.sample,
                   .slots = self.slots,
                   .slot = slot,
                   .guidance = self.guidance};
  if (!o.out || !o.base || !o.v) {
    PyErr_SetString(PyExc_ValueError, "fused_step: an operand has no memory (was a storage resized?)");
    return nullptr;
  }
  const Dtype velocity = python_dtype(v.get());
  {
    std::optional<pybind11::gil_scoped_release> released;  // worth its cost only for a large state
    if (self.numel > kGrain) released.emplace();
    run_cpu(o, self.state, velocity, false);
  }
  return out.release();
} catch (const PythonError&) {
  return nullptr;
} catch (pybind11::error_already_set& error) {
  error.restore();
  return nullptr;
} catch (const std::exception& error) {
  PyErr_SetString(PyExc_RuntimeError, error.what());
  return nullptr;
}

PyObject* stepper_left(PyObject* object, void*) {
  PyObject* const left = reinterpret_cast<Stepper*>(object)->left;
  return Py_NewRef(left ? left : Py_None);
}

PyMethodDef kStepperMethods[] = {
    {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(stepper_step)), METH_FASTCALL,
     "step(state, base, t, h1, h2, h3, row, commit, slot, history)\n--\n\n"
     "As flowmatch_kernels.sampling.Stepper.step."},
    {nullptr, nullptr, 0, nullptr}};

PyGetSetDef kStepperAttributes[] = {
    {"left", stepper_left, nullptr, "After a step that was not taken: the velocities.", nullptr},
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

PyType_Spec kStepper = {"flowmatch_kernels._C.Stepper", sizeof(Stepper), 0, Py_TPFLAGS_DEFAULT, kStepperSlots};

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
  torch_.tensor = pybind11::object(torch.attr("Tensor")).release().ptr();
  torch_.strided = pybind11::object(torch.attr("strided")).release().ptr();
  if (pybind11::hasattr(torch.attr("_C"), "_storage_Use_Count")) {
    torch_.storage_use_count = pybind11::object(torch.attr("_C").attr("_storage_Use_Count")).release().ptr();
    const pybind11::object own = torch.attr("empty")(1, pybind11::arg("device") = "cpu");
    const Holders who = holders(own.ptr());
    torch_.uses = who.uses, torch_.references = who.references;
  }
  m.attr("fused_step_cpu") =
      pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&kFusedStepCpu, nullptr, nullptr));
  m.attr("Stepper") = pybind11::reinterpret_steal<pybind11::object>(PyType_FromSpec(&kStepper));
}
}  // namespace flowmatch_kernels

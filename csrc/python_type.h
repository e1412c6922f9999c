// A C++ class as a Python type, in plain C: a call of a method costs some hundredths of a microsecond.
#pragma once

#include <memory>

#include "python_tensor.h"

namespace flowmatch_kernels {

template <class T>
struct PythonObject {
  PyObject_HEAD;
  T* value;
};

template <class T>
void deallocate(PyObject* object) {
  delete reinterpret_cast<PythonObject<T>*>(object)->value;
  PyTypeObject* const type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

template <class T>
PyObject* make(PyTypeObject* type, std::unique_ptr<T> value) {
  Object made(type->tp_alloc(type, 0));
  reinterpret_cast<PythonObject<T>*>(made.get())->value = value.release();
  return made.release();
}

// A method of T, with so many arguments.
template <class T, Py_ssize_t kCount, auto kMethod>
PyObject* method(PyObject* object, PyObject* const* p, Py_ssize_t count) {
  return guard([&]() -> PyObject* {
    if (count != kCount) {
      return PyErr_Format(PyExc_TypeError, "this method of Rows takes %zd arguments, got %zd", kCount, count);
    }
    return kMethod(*reinterpret_cast<PythonObject<T>*>(object)->value, p);
  });
}

template <class T, Py_ssize_t kCount, auto kMethod>
constexpr PyMethodDef define(const char* name, const char* documentation) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&method<T, kCount, kMethod>)), METH_FASTCALL,
          documentation};
}

// T's Python type; `methods` ends in an entry of nulls.
template <class T>
PyObject* type_of(const char* name, newfunc create, PyMethodDef* methods, const char* documentation) {
  PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(create)},
                         {Py_tp_dealloc, reinterpret_cast<void*>(&deallocate<T>)},
                         {Py_tp_methods, methods},
                         {Py_tp_doc, const_cast<char*>(documentation)},
                         {0, nullptr}};
  PyType_Spec spec = {name, sizeof(PythonObject<T>), 0, Py_TPFLAGS_DEFAULT, slots};
  return Object(PyType_FromSpec(&spec)).release();
}

// step_fn(x=x, t=t)
inline PyObject* call(PyObject* step_fn, PyObject* x, PyObject* t) {
  static PyObject* const names = Object(Py_BuildValue("(NN)", interned("x"), interned("t"))).release();
  PyObject* arguments[] = {nullptr, x, t};
  return PyObject_Vectorcall(step_fn, arguments + 1, PY_VECTORCALL_ARGUMENTS_OFFSET, names);
}

// How often x was written to, as far as PyTorch counts it.
inline std::int64_t version(PyObject* x) {
  static PyObject* const name = interned("_version");
  return integer(Object(PyObject_GetAttr(x, name)).get());
}

}  // namespace flowmatch_kernels

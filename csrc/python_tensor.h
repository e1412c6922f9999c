// What C++ sees of a Python tensor, without ATen: its memory, shape, dtype and device. And Python objects in C++.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "fused_step.h"

namespace flowmatch_kernels {

struct PythonError {};  // Python's error indicator is set

class Object {  // owns a reference
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

// Runs f; a C++ exception becomes Python's: std::invalid_argument a ValueError, what is no other a RuntimeError.
template <class F>
PyObject* guard(F&& f) {
  try {
    return f();
  } catch (const PythonError&) {
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

[[noreturn]] void raise(PyObject* type, const std::string& message);

// What a capsule of this name holds: a function. Throws Python's ValueError where it is another.
template <class Function>
Function* function_in(const pybind11::object& capsule, const char* name) {
  void* const address = PyCapsule_GetPointer(capsule.ptr(), name);
  if (!address) throw pybind11::error_already_set();
  return reinterpret_cast<Function*>(address);
}

PyObject* interned(const char* name);
std::int64_t integer(PyObject* object);
bool truth(PyObject* object);

// Looks up what is torch's, once, when the module is imported.
void find_torch(const pybind11::module_& torch);

// torch's DLPack exchange functions, or null: then a tensor is asked by its Python attributes, and no memory can become
// a tensor.
const dlpack::ExchangeApi* exchange_api();

bool is_tensor(PyObject* object);

// A tensor's memory and shape, while the tensor lives and is not changed in place.
struct View {
  bool seen = false;   // it has memory to look at: no FakeTensor, no sparse or nested tensor
  bool plain = false;  // of type torch.Tensor itself, no subclass
  void* memory = nullptr;
  std::optional<Dtype> dtype;  // none: another than the four
  bool int64 = false;
  int device = 0;  // kHost, kOther, or the index of a CUDA or ROCm device
  int ndim = 0;
  const std::int64_t* shape = nullptr;
  const std::int64_t* strides = nullptr;  // in elements

  static constexpr int kHost = -1, kOther = -2;

  explicit View(PyObject* tensor);
  View(const View&) = delete;
  View(View&&) = default;  // its shape stays where it is

  std::int64_t numel() const;
  bool contiguous() const;

 private:
  void by_attributes(PyObject* tensor);

  std::vector<std::int64_t> sizes_;  // where there is no exchange API
};

// Whether a tensor's memory does not hold its values as they are: its negative bit is set, or it is one of autograd's
// zero tensors.
bool lazy(PyObject* tensor);
bool negative(PyObject* tensor);  // its negative bit alone, where there is memory for sure

// A tensor as contiguous memory that holds its values: itself, or one copy.
Object dense(PyObject* tensor);

}  // namespace flowmatch_kernels

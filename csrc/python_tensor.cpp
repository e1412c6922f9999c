#include "python_tensor.h"

namespace flowmatch_kernels {
namespace {

PyObject* tensor_type;      // torch.Tensor
PyObject* torch_dtypes[4];  // torch.float32, ... in the order of Dtype
PyObject* torch_int64;
const dlpack::ExchangeApi* api;

PyObject *is_neg, *is_zerotensor;  // methods of torch.Tensor

// tensor.method(), without a look-up of its name
bool is(PyObject* tensor, PyObject* method) {
  const Object answer(PyObject_Vectorcall(method, &tensor, 1, nullptr));
  return answer.get() == Py_True;
}

std::optional<Dtype> dtype_of(const dlpack::Tensor& tensor) {
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

// Forgets an exception, but no KeyboardInterrupt or the like.
void clear_exception() {
  if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) throw PythonError();
  PyErr_Clear();
}

}  // namespace

void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw PythonError();
}

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

void find_torch(const pybind11::module_& torch) {
  const char* const names[] = {"float32", "float64", "bfloat16", "float16"};
  for (int k = 0; k < 4; ++k) torch_dtypes[k] = pybind11::object(torch.attr(names[k])).release().ptr();
  torch_int64 = pybind11::object(torch.attr("int64")).release().ptr();
  const pybind11::object tensor = torch.attr("Tensor");
  tensor_type = pybind11::object(tensor).release().ptr();
  is_neg = pybind11::object(tensor.attr("is_neg")).release().ptr();
  is_zerotensor = pybind11::object(tensor.attr("_is_zerotensor")).release().ptr();
  if (!pybind11::hasattr(tensor, dlpack::kAttribute)) return;
  const pybind11::object capsule = tensor.attr(dlpack::kAttribute);
  const auto* found = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
  if (!found) throw pybind11::error_already_set();
  if (found->major == dlpack::kMajor && found->from_python && found->to_python) api = found;
}

const dlpack::ExchangeApi* exchange_api() { return api; }

bool is_tensor(PyObject* object) {
  const int answer = PyObject_IsInstance(object, tensor_type);
  if (answer < 0) throw PythonError();
  return answer == 1;
}

View::View(PyObject* tensor) {
  plain = reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == tensor_type;
  if (!plain && !is_tensor(tensor)) return;
  if (!api) {
    by_attributes(tensor);
    return;
  }
  dlpack::Tensor raw;
  if (api->from_python(tensor, &raw) != 0) {
    clear_exception();
    return;
  }
  seen = true;
  memory = static_cast<char*>(raw.data) + raw.byte_offset;
  dtype = dtype_of(raw);
  int64 = raw.code == dlpack::kInt && raw.bits == 64;
  const bool gpu = raw.device_type == dlpack::kCuda || raw.device_type == dlpack::kRocm;
  device = raw.device_type == dlpack::kCpu ? kHost : gpu ? raw.device_id : kOther;
  ndim = raw.ndim, shape = raw.shape, strides = raw.strides;
}

void View::by_attributes(PyObject* tensor) {
  const pybind11::handle x(tensor);
  try {
    memory = reinterpret_cast<void*>(x.attr("data_ptr")().cast<std::uintptr_t>());
    const pybind11::object its_dtype = x.attr("dtype");
    for (int k = 0; k < 4; ++k) {
      if (its_dtype.ptr() == torch_dtypes[k]) dtype = static_cast<Dtype>(k);
    }
    int64 = its_dtype.ptr() == torch_int64;
    const bool on_host = x.attr("is_cpu").cast<bool>(), on_gpu = x.attr("is_cuda").cast<bool>();
    device = on_host ? kHost : on_gpu ? x.attr("get_device")().cast<int>() : kOther;
    for (const char* name : {"size", "stride"}) {
      for (const pybind11::handle entry : x.attr(name)()) sizes_.push_back(entry.cast<std::int64_t>());
    }
    ndim = static_cast<int>(sizes_.size() / 2);
    shape = sizes_.data(), strides = sizes_.data() + ndim;
    seen = true;
  } catch (pybind11::error_already_set& error) {
    error.restore();
    clear_exception();
  }
}

std::int64_t View::numel() const {
  std::int64_t count = 1;
  for (int d = 0; d < ndim; ++d) count *= shape[d];
  return count;
}

bool View::contiguous() const {
  if (numel() == 0) return true;
  std::int64_t stride = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    if (shape[d] != 1 && strides[d] != stride) return false;
    stride *= shape[d];
  }
  return true;
}

bool negative(PyObject* tensor) { return is(tensor, is_neg); }

bool lazy(PyObject* tensor) { return negative(tensor) || is(tensor, is_zerotensor); }

Object dense(PyObject* tensor) {
  static PyObject* const names[] = {interned("clone"), interned("resolve_neg"), interned("contiguous")};
  Object x(is(tensor, is_zerotensor) ? PyObject_CallMethodNoArgs(tensor, names[0]) : Py_NewRef(tensor));
  x = Object(PyObject_CallMethodNoArgs(x.get(), names[1]));
  return Object(PyObject_CallMethodNoArgs(x.get(), names[2]));
}

}  // namespace flowmatch_kernels

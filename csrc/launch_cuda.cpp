// The module flowmatch_kernels._C_cuda: each op on a GPU, a capsule that flowmatch_kernels._C calls.
//
// A module of its own, since it needs torch's CUDA libraries: where they are missing, or of another CUDA major, this
// one fails to load, and the `cpu` backend is there all the same. Plain C to Python, and LibTorch's stable ABI.
#include <Python.h>

#ifndef USE_CUDA
#define USE_CUDA  // shim.h then declares the current stream; a CPU build of torch has the same header
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>
#include <string>

#include "fused_step_cuda.h"
#include "keyed_noise_cuda.h"
#include "launch.h"
#include "step_log_prob_cuda.h"

namespace flowmatch_kernels {
namespace {

void* current_stream(int device, const char* op) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error(std::string(op) + ": torch has no current CUDA stream for this device");
  }
  return stream;
}

void launch(const Operands& o, Dtypes dtypes, int device) {
  fused_step_cuda(o, dtypes, device, current_stream(device, "fused_step"));
}
void launch_noise(const NoiseOperands& o, Dtype dtype, int device) {
  keyed_noise_cuda(o, dtype, device, current_stream(device, "keyed_noise"));
}
void launch_log_prob(const LogProbOperands& o, Dtype base, Dtype velocity, int device) {
  step_log_prob_cuda(o, base, velocity, device, current_stream(device, "step_log_prob"));
}

// Adds a function's address to a module, as a capsule; false where Python has set an error.
template <class Launch>
bool add(PyObject* made, const char* name, Launch* address, const char* capsule_name) {
  PyObject* const capsule = PyCapsule_New(reinterpret_cast<void*>(address), capsule_name, nullptr);
  if (!capsule) return false;
  if (PyModule_AddObject(made, name, capsule) == 0) return true;
  Py_DECREF(capsule);
  return false;
}

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace flowmatch_kernels

PyMODINIT_FUNC PyInit__C_cuda() {
  using namespace flowmatch_kernels;
  PyObject* const made = PyModule_Create(&module);
  if (!made) return nullptr;
  if (add<LaunchCuda>(made, "launch", &launch, kLaunchCudaCapsule) &&
      add<LaunchNoiseCuda>(made, "launch_noise", &launch_noise, kLaunchNoiseCudaCapsule) &&
      add<LaunchLogProbCuda>(made, "launch_log_prob", &launch_log_prob, kLaunchLogProbCudaCapsule)) {
    return made;
  }
  Py_DECREF(made);
  return nullptr;
}

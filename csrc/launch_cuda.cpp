// The module flowmatch_kernels._C_cuda: fused_step on a GPU, a capsule that flowmatch_kernels._C calls.
//
// A module of its own, since it needs torch's CUDA libraries: where they are missing, or of another CUDA major, this
// one fails to load, and the `cpu` backend is there all the same. Plain C to Python, and LibTorch's stable ABI.
#include <Python.h>

#ifndef USE_CUDA
#define USE_CUDA  // shim.h then declares the current stream; a CPU build of torch has the same header
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>

#include "fused_step_cuda.h"
#include "launch.h"

namespace flowmatch_kernels {
namespace {

void launch(const Operands& o, Dtypes dtypes, int device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("fused_step: torch has no current CUDA stream for this device");
  }
  fused_step_cuda(o, dtypes, device, stream);
}

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace flowmatch_kernels

PyMODINIT_FUNC PyInit__C_cuda() {
  using namespace flowmatch_kernels;
  PyObject* const made = PyModule_Create(&module);
  static LaunchCuda* const address = &launch;
  PyObject* const capsule = PyCapsule_New(reinterpret_cast<void*>(address), kLaunchCudaCapsule, nullptr);
  if (!made || !capsule || PyModule_AddObject(made, "launch", capsule) < 0) return nullptr;
  return made;
}

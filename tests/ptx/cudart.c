// A double of the CUDA runtime library, as far as the extension's CUDA half needs one, for a machine without a GPU.
//
// The host code that nvcc makes registers its kernels here by name, and a launch goes to a function of the test's, with
// what a GPU would get: name, grid, block, the parameters' bytes, stream, and the device that is current.
#include <stddef.h>

#define VISIBLE __attribute__((visibility("default")))
enum { kDevices = 2, kInvalidDeviceFunction = 98, kInvalidDevice = 101, kKernels = 4096 };

typedef struct {
  unsigned x, y, z;
} dim3;
typedef int Launch(const char* name, dim3 grid, dim3 block, void** parameters, size_t shared, void* stream, int device);

static Launch* launch;  // null: launches do nothing
static struct {
  const void* function;
  const char* name;
} kernels[kKernels];
static int kernel_count, device, last_error;

// ---- for the test ----

VISIBLE void double_set_launch(Launch* function) { launch = function; }
VISIBLE int double_kernel_count(void) { return kernel_count; }
VISIBLE int double_device(void) { return device; }
VISIBLE int double_last_error(void) { return last_error; }

// torch's current stream: another for each device.
int aoti_torch_get_current_cuda_stream(int of, void** stream) {
  *stream = (void*)(0x1000 * (size_t)(of + 1));
  return 0;
}

// ---- what nvcc's host code calls ----

void** __cudaRegisterFatBinary(void* binary) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void** handle) {}
void __cudaUnregisterFatBinary(void** handle) {}
char __cudaInitModule(void** handle) { return 1; }
void __cudaRegisterFunction(void** handle, const char* function, char* device_function, const char* name, int limit,
                            void* thread, void* block, void* block_size, void* grid_size, int* warp) {
  if (kernel_count == kKernels) return;
  kernels[kernel_count].function = function;
  kernels[kernel_count++].name = name;
}
int __cudaGetKernel(void** kernel, const void* function) {
  *kernel = (void*)function;
  return 0;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) { return 0; }
int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) { return 0; }

static int failed(int error) {
  if (error) last_error = error;
  return error;
}
int cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** parameters, size_t shared, void* stream) {
  if (!launch) return 0;
  for (int i = 0; i < kernel_count; ++i) {
    if (kernels[i].function != function) continue;
    return failed(launch(kernels[i].name, grid, block, parameters, shared, stream, device));
  }
  return failed(kInvalidDeviceFunction);
}
int __cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** parameters, size_t shared, void* stream) {
  return cudaLaunchKernel(function, grid, block, parameters, shared, stream);
}

// ---- the runtime's own functions that fused_step_cuda.cu calls ----

int cudaGetDevice(int* current) {
  *current = device;
  return 0;
}
int cudaSetDevice(int wanted) {
  if (wanted < 0 || wanted >= kDevices) return failed(kInvalidDevice);
  device = wanted;
  return 0;
}
int cudaGetLastError(void) {
  const int error = last_error;
  last_error = 0;
  return error;
}
const char* cudaGetErrorString(int error) { return error == kInvalidDevice ? "invalid device" : "launch failed"; }

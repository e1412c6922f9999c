// What this package uses of DLPack 1.x: the C functions by which a Python tensor says where and what its memory is, and
// by which memory becomes a Python tensor, in some hundredths of a microsecond. The layout is DLPack's, and stays
// within its major version.  https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <cstdint>

namespace flowmatch_kernels::dlpack {

constexpr std::uint32_t kMajor = 1;
constexpr const char* kAttribute = "__dlpack_c_exchange_api__";  // of a tensor's type
constexpr const char* kCapsule = "dlpack_exchange_api";

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2, kRocm = 10 };
enum TypeCode : std::uint8_t { kInt = 0, kFloat = 2, kBFloat = 4 };

struct Tensor {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t ndim;
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

struct ManagedTensor {
  std::uint32_t major;
  std::uint32_t minor;
  void* context;
  void (*deleter)(ManagedTensor*);
  std::uint64_t flags;
  Tensor tensor;
};

struct ExchangeApi {
  std::uint32_t major;
  std::uint32_t minor;
  ExchangeApi* previous;
  void (*allocate)();                                      // not used here
  void (*owned_from_python)();                             // not used here
  int (*to_python)(ManagedTensor* steals, void** tensor);  // 0, or -1 with Python's error set. May be null
  int (*from_python)(void* tensor, Tensor* out);           // borrowed; likewise
  void (*current_stream)();                                // not used here
};

}  // namespace flowmatch_kernels::dlpack

#include "block_tensor.h"

#include <algorithm>
#include <cstdlib>
#include <new>

namespace flowmatch_kernels {

PyObject* tensor_over(Block* block, const Layout& layout, std::int64_t offset) {
  struct Owned {
    dlpack::ManagedTensor managed;
    std::int64_t sizes[];  // shape, strides
  };
  const std::size_t rank = layout.shape.size();
  auto* owned = static_cast<Owned*>(std::malloc(sizeof(Owned) + 2 * rank * sizeof(std::int64_t)));
  if (!owned) throw std::bad_alloc();
  std::copy(layout.shape.begin(), layout.shape.end(), owned->sizes);
  std::copy(layout.strides.begin(), layout.strides.end(), owned->sizes + rank);
  const auto deleter = [](dlpack::ManagedTensor* managed) {
    release(static_cast<Block*>(managed->context));
    std::free(managed);
  };
  owned->managed = {.major = dlpack::kMajor,
                    .minor = 0,
                    .context = block,
                    .deleter = deleter,
                    .flags = 0,
                    .tensor = {.data = static_cast<char*>(block->memory) + offset * size_of(layout.dtype),
                               .device_type = dlpack::kCpu,
                               .device_id = 0,
                               .ndim = static_cast<std::int32_t>(rank),
                               .code = layout.dtype == Dtype::kBFloat16 ? dlpack::kBFloat : dlpack::kFloat,
                               .bits = static_cast<std::uint8_t>(8 * size_of(layout.dtype)),
                               .lanes = 1,
                               .shape = owned->sizes,
                               .strides = owned->sizes + rank,
                               .byte_offset = 0}};
  use(block);
  void* tensor = nullptr;
  if (exchange_api()->to_python(&owned->managed, &tensor) != 0) throw PythonError();  // it has called the deleter
  return static_cast<PyObject*>(tensor);
}

}  // namespace flowmatch_kernels

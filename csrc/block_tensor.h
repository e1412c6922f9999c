// A Python tensor over a block of the host pool.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "host_pool.h"
#include "python_tensor.h"

namespace flowmatch_kernels {

class Use {  // one use of a block
 public:
  explicit Use(Block* block = nullptr) : block_(block) {}
  ~Use() {
    if (block_) release(block_);
  }
  Use(Use&& other) noexcept : block_(std::exchange(other.block_, nullptr)) {}
  Use& operator=(Use&& other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  Block* get() const { return block_; }
  char* memory() const { return block_ ? static_cast<char*>(block_->memory) : nullptr; }
  explicit operator bool() const { return block_; }

 private:
  Block* block_;
};

struct Layout {
  Dtype dtype;
  std::vector<std::int64_t> shape, strides;

  static Layout contiguous(Dtype dtype, std::vector<std::int64_t> shape) {
    std::vector<std::int64_t> strides(shape.size());
    std::int64_t stride = 1;
    for (std::size_t d = shape.size(); d-- > 0;) strides[d] = stride, stride *= shape[d];
    return {dtype, std::move(shape), std::move(strides)};
  }
  std::int64_t numel() const {
    std::int64_t count = 1;
    for (const std::int64_t size : shape) count *= size;
    return count;
  }
};

// A tensor over a block's memory, `offset` elements in. Its storage counts the block out when the last that holds it
// lets go. Needs exchange_api(). A new reference.
PyObject* tensor_over(Block* block, const Layout& layout, std::int64_t offset = 0);

}  // namespace flowmatch_kernels

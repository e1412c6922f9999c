#include "host_pool.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <new>

namespace flowmatch_kernels {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kHugePage = std::size_t{1} << 21;

// Sizes are rounded up so that a somewhat smaller state finds the block: to an eighth of the power of two below.
std::size_t size_class(std::size_t bytes) {
  std::size_t unit = kLine;
  while (unit * 16 <= bytes) unit *= 2;
  if (bytes >= kHugePage && unit < kHugePage) unit = kHugePage;
  return bytes == 0 ? unit : (bytes + unit - 1) / unit * unit;
}

class Pool {
 public:
  Block* take(std::size_t bytes) {
    const std::size_t size = size_class(bytes);
    Block* block = nullptr;
    {
      const std::lock_guard lock(mutex);
      const auto idle = idle_.find(size);
      if (idle != idle_.end()) {
        block = idle->second.back();  // the one used last: most likely in a cache
        idle->second.pop_back();
        if (idle->second.empty()) idle_.erase(idle);
        sizes_.idle -= size;
      }
      sizes_.in_use += size;
    }
    if (!block && !(block = allocate(size))) {
      empty();  // what is idle in other sizes may make room
      if (!(block = allocate(size))) {
        const std::lock_guard lock(mutex);
        sizes_.in_use -= size;
        throw std::bad_alloc();
      }
    }
    block->uses.store(1, std::memory_order_relaxed);
    return block;
  }

  void give_back(Block* block) {
    const std::lock_guard lock(mutex);
    sizes_.in_use -= block->bytes;
    sizes_.idle += block->bytes;
    block->age = ++clock_;
    idle_[block->bytes].push_back(block);
    trim(sizes_.limit);
  }

  void limit(std::size_t bytes) {
    const std::lock_guard lock(mutex);
    sizes_.limit = bytes;
    trim(bytes);
  }

  void empty() {
    const std::lock_guard lock(mutex);
    trim(0);
  }

  PoolSizes sizes() {
    const std::lock_guard lock(mutex);
    return sizes_;
  }

  std::mutex mutex;

 private:
  static Block* allocate(std::size_t size) {
    const bool huge = size >= kHugePage;
    void* memory = nullptr;
    if (posix_memalign(&memory, huge ? kHugePage : kLine, size) != 0) return nullptr;
#if defined(__linux__)
    if (huge) madvise(memory, size, MADV_HUGEPAGE);  // only a wish: filling fresh memory then takes a quarter
#endif
    auto* block = new (std::nothrow) Block{memory, size, {0}, 0};
    if (!block) std::free(memory);
    return block;
  }

  // Frees the longest idle until they are within `bytes`. There are few sizes: eight for each power of two.
  void trim(std::size_t bytes) {
    while (sizes_.idle > bytes) {
      auto oldest = idle_.begin();
      for (auto size = idle_.begin(); size != idle_.end(); ++size) {
        if (size->second.front()->age < oldest->second.front()->age) oldest = size;
      }
      Block* const block = oldest->second.front();
      oldest->second.pop_front();
      if (oldest->second.empty()) idle_.erase(oldest);
      sizes_.idle -= block->bytes;
      std::free(block->memory);
      delete block;
    }
  }

  std::map<std::size_t, std::deque<Block*>> idle_;
  PoolSizes sizes_{std::size_t{512} << 20, 0, 0};
  std::uint64_t clock_ = 0;
};

Pool& pool() {
  // Never destroyed: a tensor may outlive every destructor.
  static Pool* const pool = [] {
    static Pool* const made = new Pool;
    // A child of fork() has a copy of the pool; nobody may hold its lock at that moment.
    pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); }, [] { made->mutex.unlock(); });
    return made;
  }();
  return *pool;
}

}  // namespace

Block* take_block(std::size_t bytes) { return pool().take(bytes); }

void release(Block* block) {
  if (block->uses.fetch_sub(1, std::memory_order_acq_rel) == 1) pool().give_back(block);
}

PoolSizes pool_sizes() { return pool().sizes(); }
void set_pool_limit(std::size_t bytes) { pool().limit(bytes); }
void empty_pool() { pool().empty(); }

}  // namespace flowmatch_kernels

// Memory on the host for states and trajectories, kept for reuse: blocks that count who uses them.
//
// Fresh memory is the main cost of a large state on the CPU: the system clears each page at its first write. So a block
// that nobody uses any more goes to a pool, up to a limit in bytes, and serves again. Knows nothing of Python.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace flowmatch_kernels {

struct Block {
  void* memory;       // aligned to 64 bytes; from 2 MiB up, to huge pages
  std::size_t bytes;  // its capacity
  // One for the loop that took it, and one for each tensor over it: a tensor's storage counts itself out when the last
  // view, array, graph or thread that holds it lets go.
  std::atomic<std::int64_t> uses;
  std::uint64_t age;  // the pool's, of an idle block
};

// A block of at least so many bytes, with one use. Throws std::bad_alloc. Safe in any thread, as all of these are.
Block* take_block(std::size_t bytes);

inline void use(Block* block) { block->uses.fetch_add(1, std::memory_order_relaxed); }

// Takes one use back; the last one gives the block to the pool. Needs no interpreter: a tensor may be dropped by any
// thread, and after Python has ended.
void release(Block* block);

// Whether anybody but the one who asks uses it. What others did with the memory has then happened before.
inline bool held(const Block* block) { return block->uses.load(std::memory_order_acquire) > 1; }

struct PoolSizes {
  std::size_t limit;   // the most that idle blocks may add up to, in bytes
  std::size_t idle;    // what they add up to
  std::size_t in_use;  // what the others add up to
};
PoolSizes pool_sizes();

// Idle blocks beyond the new limit are freed, the longest idle first.
void set_pool_limit(std::size_t bytes);

// Frees all idle blocks.
void empty_pool();

}  // namespace flowmatch_kernels

// Stands in for CUDA's header: what csrc's *_cuda.cu use of CUDA, on the host. A launch runs every thread of the grid, one
// after the other, or from barrier to barrier; every call, launch and access to memory can be recorded.
#pragma once

#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block runs at a time
#define __forceinline__ inline
#define __launch_bounds__(...)
#define FLOWMATCH_LOAD(address) host_cuda::load(address, 'b')
#define FLOWMATCH_STORE(address, word) host_cuda::store(address, word, 'w')

struct alignas(8) uint2 {
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
struct dim3 {
  unsigned int x, y, z;
  explicit dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

inline dim3 blockIdx(0, 0, 0), threadIdx(0, 0, 0);

using cudaStream_t = struct CUstream_st*;
enum cudaError_t : int { cudaSuccess = 0 };

// AddressSanitizer's, which is preloaded.
extern "C" void* __asan_region_is_poisoned(void* begin, std::size_t size);
extern "C" void __asan_report_load_n(void* address, std::size_t size);
extern "C" void __asan_report_store_n(void* address, std::size_t size);

namespace host_cuda {

// One access: 'c' constant load, 'b' load, 'l' last load, 'w' store, 's' streaming store.
struct Access {
  char kind;
  std::uintptr_t address;
  int bytes;
};

struct Launch {
  std::uintptr_t kernel;
  dim3 grid, block;
  std::size_t shared;
  std::uintptr_t stream;
  int device;  // current when launched
};

struct Double {
  enum class Run {
    kForward,
    kBackward,
    kNone,
    kOne
  } run = Run::kForward;  // the order of threads, or what to leave out
  std::int64_t one = 0;   // the thread that kOne runs
  bool together = false;  // the threads of a block wait for each other: each has a stack of its own
  bool touch = true;      // access memory; if not, loads give zero
  bool record = false;    // fill `accesses`
  int device = 0;         // current
  int last_error = 0;     // what cudaGetLastError has to tell
  std::string failing;    // the call that fails, with `error`
  int error = 0;
  std::vector<std::string> calls;
  std::vector<Launch> launches;
  std::vector<Access> accesses;

  // The result of a call; a failing one is remembered, as CUDA does.
  cudaError_t result(const std::string& name, const std::string& arguments = "") {
    calls.push_back(name + "(" + arguments + ")");
    if (name != failing) return cudaSuccess;
    last_error = error;
    return static_cast<cudaError_t>(error);
  }
};
inline Double state;

// Ends the process, in AddressSanitizer's words, where an access is outside all memory or off its boundary. Every
// access of a kernel to global memory comes here: instrumented by the compiler, the kernels take three times as long
// to build.
template <class W>
void check(const W* address, void (*report)(void*, std::size_t)) {
  if (reinterpret_cast<std::uintptr_t>(address) % alignof(W)) {
    std::fprintf(stderr, "misaligned address %p for an access of %zu bytes\n", static_cast<const void*>(address), sizeof(W));
    std::_Exit(98);
  }
  void* begin = const_cast<W*>(address);
  if (__asan_region_is_poisoned(begin, sizeof(W))) report(begin, sizeof(W));
}

template <class W>
W load(const W* address, char kind) {
  if (state.record) state.accesses.push_back({kind, reinterpret_cast<std::uintptr_t>(address), sizeof(W)});
  if (state.touch) check(address, __asan_report_load_n);
  return state.touch ? *address : W{};
}
template <class W>
void store(W* address, W word, char kind) {
  if (state.record) state.accesses.push_back({kind, reinterpret_cast<std::uintptr_t>(address), sizeof(W)});
  if (state.touch) check(address, __asan_report_store_n);
  if (state.touch) *address = word;
}

// One block whose threads stop at each barrier until all have come there: each runs to its next one in its turn. So what
// a thread reads before a barrier that another writes after it, or the other way round, depends on their order.
class Block {
 public:
  Block(std::int64_t first, int threads, const std::function<void(std::int64_t)>& thread)
      : first_(first), thread_(thread), fibers_(threads), ended_(threads) {
    current_ = this;
    stacks_.resize(threads * kStack);
    for (int t = 0; t < threads; ++t) {
      getcontext(&fibers_[t]);
      fibers_[t].uc_stack = {.ss_sp = stacks_.data() + t * kStack, .ss_flags = 0, .ss_size = kStack};
      fibers_[t].uc_link = nullptr;
      makecontext(&fibers_[t], &Block::enter, 0);
    }
    for (bool left = true; left;) {
      left = false;
      for (int k = 0; k < threads; ++k) {
        running_ = state.run == Double::Run::kBackward ? threads - 1 - k : k;
        if (ended_[running_]) continue;
        switch_to(&scheduler_, &fibers_[running_], stacks_.data() + running_ * kStack, kStack);
        left = left || !ended_[running_];
      }
    }
    current_ = nullptr;
  }
  // Called by a thread: lets the others come to the barrier.
  static void wait() {
    if (state.run == Double::Run::kOne) return;  // alone: what it reads of others counts for nothing
    if (!current_) throw std::logic_error("a kernel with a barrier needs Double::together");
    Block& block = *current_;
    const int thread = block.running_;
    block.switch_to(&block.fibers_[thread], &block.scheduler_, block.bottom_, block.size_);
    threadIdx.x = static_cast<unsigned int>(thread);
  }

 private:
  static constexpr std::size_t kStack = 1 << 15;

  static void enter() {
    Block& block = *current_;
    __sanitizer_finish_switch_fiber(nullptr, &block.bottom_, &block.size_);
    block.thread_(block.first_ + block.running_);
    block.ended_[block.running_] = true;
    block.switch_to(&block.fibers_[block.running_], &block.scheduler_, block.bottom_, block.size_);
  }
  void switch_to(ucontext_t* from, ucontext_t* to, const void* bottom, std::size_t size) {
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, bottom, size);
    swapcontext(from, to);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }

  static inline Block* current_ = nullptr;
  std::int64_t first_;
  const std::function<void(std::int64_t)>& thread_;
  ucontext_t scheduler_;
  std::vector<ucontext_t> fibers_;
  static inline std::vector<char> stacks_;  // kept: to make them anew takes ten times as long as to run a block
  std::vector<char> ended_;
  int running_ = 0;
  const void* bottom_ = nullptr;  // of the stack that called
  std::size_t size_ = 0;
};

// Runs threads of the grid. Arguments are copied out of `arguments` at the launch, as CUDA does.
template <class... P>
void run(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments) {
  const auto copies = [&]<std::size_t... k>(std::index_sequence<k...>) {
    return std::tuple<std::remove_const_t<P>...>(*static_cast<std::remove_const_t<P>*>(arguments[k])...);
  }(std::index_sequence_for<P...>{});
  const auto thread = [&](std::int64_t t) {
    blockIdx.x = static_cast<unsigned int>(t / block.x);
    threadIdx.x = static_cast<unsigned int>(t % block.x);
    std::apply(kernel, copies);
  };
  const std::int64_t threads = static_cast<std::int64_t>(grid.x) * block.x;
  if (state.together && (state.run == Double::Run::kForward || state.run == Double::Run::kBackward)) {
    for (std::int64_t first = 0; first < threads; first += block.x) Block(first, block.x, thread);
    return;
  }
  if (state.run == Double::Run::kForward) {
    for (std::int64_t t = 0; t < threads; ++t) thread(t);
  } else if (state.run == Double::Run::kBackward) {
    for (std::int64_t t = threads; t-- > 0;) thread(t);
  } else if (state.run == Double::Run::kOne) {
    if (state.one < 0 || state.one >= threads) throw std::out_of_range("no such thread in the grid");
    thread(state.one);
  }
}

}  // namespace host_cuda

inline void __syncthreads() { host_cuda::Block::wait(); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(x) * y) >> 64);
}
template <class W>
W __ldg(const W* address) {
  return host_cuda::load(address, 'c');
}
template <class W>
W __ldcs(const W* address) {
  return host_cuda::load(address, 'l');
}
template <class W>
void __stwb(W* address, W word) {
  host_cuda::store(address, word, 'w');
}
template <class W>
void __stcs(W* address, W word) {
  host_cuda::store(address, word, 's');
}

inline cudaError_t cudaGetDevice(int* device) {
  const cudaError_t error = host_cuda::state.result("cudaGetDevice");
  if (error == cudaSuccess) *device = host_cuda::state.device;
  return error;
}
inline cudaError_t cudaSetDevice(int device) {
  const cudaError_t error = host_cuda::state.result("cudaSetDevice", std::to_string(device));
  if (error == cudaSuccess) host_cuda::state.device = device;
  return error;
}
inline cudaError_t cudaGetLastError() {
  host_cuda::state.calls.push_back("cudaGetLastError()");
  return static_cast<cudaError_t>(std::exchange(host_cuda::state.last_error, 0));
}
inline const char* cudaGetErrorString(cudaError_t error) {
  static std::string text;
  text = "the words for error " + std::to_string(static_cast<int>(error));
  return text.c_str();
}
// CUDA's own template of this name, by which a kernel's type, and with it the types of its arguments, is known.
template <class Kernel>
cudaError_t cudaLaunchKernel(Kernel* kernel, dim3 grid, dim3 block, void** arguments, std::size_t shared,
                             cudaStream_t stream) {
  host_cuda::Double& state = host_cuda::state;
  const cudaError_t error = state.result("cudaLaunchKernel");
  if (error != cudaSuccess) return error;
  state.launches.push_back({reinterpret_cast<std::uintptr_t>(kernel), grid, block, shared,
                            reinterpret_cast<std::uintptr_t>(stream), state.device});
  host_cuda::run(kernel, grid, block, arguments);
  return cudaSuccess;
}

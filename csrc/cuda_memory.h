// What a thread of a CUDA kernel moves: vectors of elements, in as few accesses as there can be.
//
// Of CUDA it needs only what tests/host_cuda/cuda_runtime.h doubles: there every access is recorded.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#ifndef FLOWMATCH_LOAD
#define FLOWMATCH_LOAD(address) (*(address))
#define FLOWMATCH_STORE(address, word) (*(address) = (word))
#endif

namespace flowmatch_kernels {

constexpr int kAccess = 16;  // bytes, the widest load and store of every architecture

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// kSize elements that one thread holds, moved in as few accesses as there can be.
template <class T, int kSize>
struct Vector {
  static constexpr int kBytes = kSize * sizeof(T);
  static constexpr int kWord = kBytes < kAccess ? kBytes : kAccess;
  static constexpr int kWords = kBytes / kWord;
  using W = typename Word<kWord>::type;

  T element[kSize];

  __device__ __forceinline__ T& operator[](int j) { return element[j]; }
  __device__ __forceinline__ const T& operator[](int j) const { return element[j]; }

  // f(address) is the load of one word.
  template <class Load>
  static __device__ __forceinline__ Vector from(const void* address, std::int64_t i, Load load) {
    const W* source = reinterpret_cast<const W*>(static_cast<const T*>(address) + i);
    W words[kWords];
#pragma unroll
    for (int k = 0; k < kWords; ++k) words[k] = load(source + k);
    Vector vector;
    std::memcpy(vector.element, words, kBytes);
    return vector;
  }
  template <class Store>
  __device__ __forceinline__ void to(void* address, std::int64_t i, Store store) const {
    W words[kWords];
    std::memcpy(words, element, kBytes);
    W* target = reinterpret_cast<W*>(static_cast<T*>(address) + i);
#pragma unroll
    for (int k = 0; k < kWords; ++k) store(target + k, words[k]);
  }
};

// Whether a vector may begin at this address.
template <class T, int kSize>
bool on_boundary(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % Vector<T, kSize>::kWord == 0;
}

// Constant while the kernel runs, and wanted by every thread.
struct LoadConstant {
  template <class W>
  __device__ __forceinline__ W operator()(const W* address) const {
    return __ldg(address);
  }
};
// May be written by this kernel.
struct Load {
  template <class W>
  __device__ __forceinline__ W operator()(const W* address) const {
    return FLOWMATCH_LOAD(address);
  }
};
// Dead after this read: the first to leave the cache. A term of the history is not: k1 of rk4 is read again by its last
// row, and Adams-Bashforth's velocities by the next steps.
struct LoadLast {
  template <class W>
  __device__ __forceinline__ W operator()(const W* address) const {
    return __ldcs(address);
  }
};
// Read soon: out by the model, history by the next steps.
struct Store {
  template <class W>
  __device__ __forceinline__ void operator()(W* address, W word) const {
    FLOWMATCH_STORE(address, word);
  }
};
// Read soon, and one access for sure: of `Store` nvcc made four where the elements come from integers (keyed noise).
struct StoreWhole {
  template <class W>
  __device__ __forceinline__ void operator()(W* address, W word) const {
    __stwb(address, word);
  }
};
// Not read before sampling ends.
struct StoreLast {
  template <class W>
  __device__ __forceinline__ void operator()(W* address, W word) const {
    __stcs(address, word);
  }
};

// Division by the elements of one sample, or of one row, as a multiplication: a 64-bit division is a call of some 80
// instructions, and made the float64 kernel spill (8 bytes, sm_80). Exact for 0 <= i < 2^63 (Granlund and Montgomery,
// PLDI 1994, with 63 bits: the multiplier then has 64).
struct Divisor {
  std::uint64_t multiplier;  // 2^(63 + shift) / divisor, rounded up
  int shift;                 // the least with 2^shift >= divisor

  explicit Divisor(std::uint64_t divisor) : shift(0) {
    while ((std::uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<std::uint64_t>((static_cast<unsigned __int128>(1) << (63 + shift)) / divisor + 1);
  }
  // i / divisor
  __device__ __forceinline__ std::int64_t quotient(std::int64_t i) const {
    return static_cast<std::int64_t>(__umul64hi(static_cast<std::uint64_t>(i) << 1, multiplier) >> shift);
  }
};

}  // namespace flowmatch_kernels

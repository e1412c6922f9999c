// The arithmetic of fused_step, one element at a time, for every C++ backend.
//
//   h0  = v                                    unguided
//   h0  = w0*u + w1*v                          guided, three roundings to V: kWeighted,
//   h0  = u + w1*(v - u)                       kFromUnguided,
//   h0  = v + w1*(v - u)                       kFromGuided
//   out = a*base + b0*h0 + b1*h1 + b2*h2 + b3*h3       left to right, never an FMA
//   history = h0 + c*base                      h0 alone where c is 0
//
// S is the state's type (base, out, trajectory), V the velocity's (v, u), A the arithmetic type (h1..h3, history,
// coefficients). flowmatch_kernels/ops/fused_step.py is the contract and ops/reference.py the definition; names agree.
// Knows nothing of Python or PyTorch. Compile without contraction (-ffp-contract=off).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FLOWMATCH_INLINE __host__ __device__ __forceinline__
#else
#define FLOWMATCH_INLINE inline __attribute__((always_inline))
#endif

namespace flowmatch_kernels {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

constexpr std::int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// One row of coefficients: [E, 8], column by column.
enum Column : int { kA = 0, kB0 = 1, kB1 = 2, kB2 = 3, kB3 = 4, kW0 = 5, kW1 = 6, kC = 7, kColumns = 8 };

// How the two velocities of guidance are combined.
enum class Guidance : int { kWeighted = 0, kFromUnguided = 1, kFromGuided = 2 };

// What a launch reads and writes. Every tensor is contiguous; optional ones are null. Which may overlap: overlap.h.
struct Operands {
  void* out;         // S[numel]; may be base
  const void* base;  // S[numel]
  const void* v;     // V[numel]
  const void* u;     // V[numel], optional
  const void* h[3];  // A[numel], optional, filled up from h[0]
  const void* row;   // A[8]
  void* trajectory;  // S[numel / sample, slots, sample], optional
  void* history;     // A[numel], optional; may be one of h
  std::int64_t numel;
  std::int64_t sample;  // elements of one sample
  std::int64_t slots;
  std::int64_t slot;
  Guidance guidance;  // where u is not null
};

// Where element i of the state, an element of sample number b = i / o.sample, stands in trajectory[:, slot].
FLOWMATCH_INLINE std::int64_t trajectory_index(const Operands& o, std::int64_t i, std::int64_t b) {
  return i + (b * (o.slots - 1) + o.slot) * o.sample;
}
FLOWMATCH_INLINE std::int64_t trajectory_index(const Operands& o, std::int64_t i) {
  return trajectory_index(o, i, i / o.sample);
}

// ---- single operations, rounded once ----

FLOWMATCH_INLINE float multiply(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(x, y);
#else
  return x * y;
#endif
}
FLOWMATCH_INLINE double multiply(double x, double y) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(x, y);
#else
  return x * y;
#endif
}
FLOWMATCH_INLINE float add(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(x, y);
#else
  return x + y;
#endif
}
FLOWMATCH_INLINE double add(double x, double y) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(x, y);
#else
  return x + y;
#endif
}

// ---- conversions ----

template <class T>
FLOWMATCH_INLINE std::uint32_t float_bits(T x) {
  static_assert(sizeof(T) == 4);
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
FLOWMATCH_INLINE float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// condition ? x : y without a branch: compilers turn nested ?: into jumps, and then do not vectorise.
FLOWMATCH_INLINE std::uint32_t select(bool condition, std::uint32_t x, std::uint32_t y) {
  const std::uint32_t mask = 0u - static_cast<std::uint32_t>(condition);
  return (x & mask) | (y & ~mask);
}

// Storage type to float or double, exactly.
FLOWMATCH_INLINE float widen(float x) { return x; }
FLOWMATCH_INLINE double widen(double x) { return x; }
FLOWMATCH_INLINE float widen(BFloat16 x) { return float_of(static_cast<std::uint32_t>(x.bits) << 16); }
FLOWMATCH_INLINE float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  __half_raw raw;
  raw.x = x.bits;
  return __half2float(__half(raw));
#else
  // A subnormal half is its fraction times 2^-24, exactly.
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t subnormal = float_bits(static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f);
  const std::uint32_t normal = (magnitude << 13) + (112u << 23);
  const std::uint32_t special = (magnitude << 13) | 0x7f800000u;
  const std::uint32_t finite = select(magnitude < 0x0400u, subnormal, normal);
  return float_of(sign | select(magnitude >= 0x7c00u, special, finite));
#endif
}

// float or double to a storage type, to nearest even. A double goes to 16 bits by way of float, as in PyTorch.
template <class T>
struct To;
template <>
struct To<float> {
  static FLOWMATCH_INLINE float narrow(float x) { return x; }
  static FLOWMATCH_INLINE float narrow(double x) { return static_cast<float>(x); }
};
template <>
struct To<double> {
  static FLOWMATCH_INLINE double narrow(float x) { return x; }
  static FLOWMATCH_INLINE double narrow(double x) { return x; }
};
template <>
struct To<BFloat16> {
  static FLOWMATCH_INLINE BFloat16 narrow(float x) {
#if defined(__CUDA_ARCH__)
    return {static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(x)).x};
#else
    const std::uint32_t bits = float_bits(x);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<std::uint16_t>(select((bits & 0x7fffffffu) > 0x7f800000u, 0x7fc0u, rounded))};
#endif
  }
  static FLOWMATCH_INLINE BFloat16 narrow(double x) { return narrow(static_cast<float>(x)); }
};
template <>
struct To<Float16> {
  static FLOWMATCH_INLINE Float16 narrow(float x) {
#if defined(__CUDA_ARCH__)
    return {static_cast<__half_raw>(__float2half_rn(x)).x};
#else
    const std::uint32_t bits = float_bits(x);
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    // From 2^-14 up: drop 13 bits to nearest even; what overflows carries into infinity.
    const std::uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below: adding 0.5 leaves a fraction of 2^-24 steps, and rounds it to nearest even.
    const std::uint32_t subnormal = float_bits(add(float_of(magnitude), 0.5f)) - 0x3f000000u;
    const std::uint32_t special = select(magnitude > 0x7f800000u, 0x7e00u, 0x7c00u);
    const std::uint32_t finite = select(magnitude < 0x38800000u, subnormal, normal);
    return {static_cast<std::uint16_t>(sign | select(magnitude >= 0x47800000u, special, finite))};
#endif
  }
  static FLOWMATCH_INLINE Float16 narrow(double x) { return narrow(static_cast<float>(x)); }
};

// ---- the element ----

template <class T>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::type;

// The steps of one element. kVelocityRounding: products b_k*h_k are rounded to V, else to S.
template <class S, class V, bool kVelocityRounding>
struct Element {
  using A = Arithmetic<S>;
  using Weight = Arithmetic<V>;  // guidance weights: float for a float velocity, whatever the state is

  // h0, guided: w0*u + w1*v
  static FLOWMATCH_INLINE V weighted(Weight w0, V u, Weight w1, V v) { return sum(product(w0, u), product(w1, v)); }
  // h0, guided: x + w1*(v - u), where x is u or v. v - u is v + (-u), to the bit.
  static FLOWMATCH_INLINE V from(V x, Weight w1, V v, V u) {
    return sum(x, product(w1, To<V>::narrow(add(widen(v), -widen(u)))));
  }
  // b_k as it enters the product.
  static FLOWMATCH_INLINE A coefficient(A b) {
    if constexpr (kVelocityRounding) return static_cast<A>(widen(To<V>::narrow(b)));
    return b;
  }
  // a*base
  static FLOWMATCH_INLINE S start(A a, S base) { return To<S>::narrow(multiply(a, static_cast<A>(widen(base)))); }
  // out + b_k*h_k
  static FLOWMATCH_INLINE S accumulate(S out, A b, A h) {
    A product = multiply(b, h);
    if constexpr (kVelocityRounding) {
      product = static_cast<A>(widen(To<V>::narrow(product)));
    } else {
      product = static_cast<A>(widen(To<S>::narrow(product)));
    }
    return To<S>::narrow(add(static_cast<A>(widen(out)), product));
  }
  // h0 + c*base
  static FLOWMATCH_INLINE A remember(A h0, A c, S base) {
    const A shifted = add(h0, multiply(c, static_cast<A>(widen(base))));
    return c != A(0) ? shifted : h0;
  }

 private:
  static FLOWMATCH_INLINE V product(Weight w, V v) { return To<V>::narrow(multiply(w, widen(v))); }
  static FLOWMATCH_INLINE V sum(V x, V y) { return To<V>::narrow(add(widen(x), widen(y))); }
};

// Calls f.template operator()<S, V, kVelocityRounding>() for the dtypes; false where V would widen S.
template <class F>
bool dispatch(Dtype state, Dtype velocity, bool velocity_rounding, F&& f) {
#define FLOWMATCH_PAIR(S_DTYPE, S, V_DTYPE, V)                                \
  if (state == Dtype::S_DTYPE && velocity == Dtype::V_DTYPE) {                \
    velocity_rounding ? f(Element<S, V, true>{}) : f(Element<S, V, false>{}); \
    return true;                                                              \
  }
  FLOWMATCH_PAIR(kFloat32, float, kFloat32, float)
  FLOWMATCH_PAIR(kFloat32, float, kBFloat16, BFloat16)
  FLOWMATCH_PAIR(kFloat32, float, kFloat16, Float16)
  FLOWMATCH_PAIR(kFloat64, double, kFloat64, double)
  FLOWMATCH_PAIR(kFloat64, double, kFloat32, float)
  FLOWMATCH_PAIR(kFloat64, double, kBFloat16, BFloat16)
  FLOWMATCH_PAIR(kFloat64, double, kFloat16, Float16)
  FLOWMATCH_PAIR(kBFloat16, BFloat16, kBFloat16, BFloat16)
  FLOWMATCH_PAIR(kFloat16, Float16, kFloat16, Float16)
#undef FLOWMATCH_PAIR
  return false;
}

}  // namespace flowmatch_kernels

// The arithmetic of fused_step, one element at a time, for every C++ backend.
//
//   h0  = v                                    unguided
//   h0  = w0*u + w1*v                          guided, three roundings to V: kWeighted,
//   h0  = u + w1*(v - u)                       kFromUnguided,
//   h0  = v + w1*(v - u)                       kFromGuided
//   out = a*base + b0*h0 + b1*h1 + b2*h2 + b3*h3       left to right, never an FMA
//   history = h0 + c*base                      h0 alone where c is 0
//
// With strength, (b0*h0)*strength stands in the place of b0*h0.
//
// With sum_first, out = base + ((b2*h2 + b1*h1 + b0*h0) * a) * c; with h3, of b3*h3 + b1*(h2 + h1) + b0*h0; and
// history = h0.
//
// With rows of their own, elements use several rows of coefficients: each span of consecutive elements has one, and a
// term whose coefficient is 0 is left out, whatever h holds: out is a*base where all are.
//
// Where h1 is keyed, it is not read: each element is the noise that its sample's keys draw (keyed_noise.h).
//
// B is base's type, V the velocity's (v, u), O that of out and trajectory; S, to which sums are rounded, the wider of B
// and O; A the arithmetic type (h1..h3, history, coefficients). flowmatch_kernels/ops/fused_step.py is the contract and
// ops/reference.py the definition; names agree.
// Knows nothing of Python or PyTorch. Compile without contraction (-ffp-contract=off).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FLOWMATCH_INLINE __host__ __device__ __forceinline__
#elif !defined(FLOWMATCH_INLINE)  // a build that is not to be fast, and is to compile fast, says `inline`
#define FLOWMATCH_INLINE inline __attribute__((always_inline))
#endif

namespace flowmatch_kernels {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

constexpr std::int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// A, the arithmetic dtype, of a state's.
constexpr Dtype arithmetic_of(Dtype state) { return state == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32; }

using Float32 = float;
using Float64 = double;
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// One row of coefficients: [E, 8], column by column.
enum Column : int { kA = 0, kB0 = 1, kB1 = 2, kB2 = 3, kB3 = 4, kW0 = 5, kW1 = 6, kC = 7, kColumns = 8 };

// How the two velocities of guidance are combined. One byte, as Rounding: a kernel's parameters then end at 144 bytes,
// beyond which the float64 kernel with every operand spilled (8 bytes, sm_80).
enum class Guidance : std::uint8_t { kWeighted = 0, kFromUnguided = 1, kFromGuided = 2 };

// What a product b_k*h_k is rounded to: S; V; or V, with b_k rounded to V first.
enum class Rounding : std::uint8_t { kPromote = 0, kExact = 1, kRounded = 2 };

struct Dtypes {
  Dtype base;
  Dtype velocity;
  Dtype out;  // base's, or the velocity's
};

// What a launch reads and writes. Every tensor is contiguous; optional ones are null. Which may overlap: overlap.h.
struct Operands {
  void* out;         // O[numel]; may be base
  const void* base;  // B[numel]
  const void* v;     // V[numel]
  const void* u;     // V[numel], optional
  const void* h[3];  // A[numel], optional, filled up from h[0]; where `keyed`, h[0] is int64[samples, 3]
  const void* row;   // A[8]; with rows of their own, A[numel / span(), 8]
  void* trajectory;  // O[numel / sample, slots, sample], optional
  void* history;     // A[numel], optional; may be one of h
  std::int64_t numel;
  std::int64_t sample;  // elements of one sample, where there is a trajectory, rows of their own or noise
  std::int64_t slots;
  std::int64_t slot;
  Guidance guidance;  // where u is not null
  Rounding rounding;
  bool sum_first;
  bool keyed;            // h1 is noise, drawn by keys. Not with sum_first, nor where O is not B
  std::uint32_t rows;    // of their own: how many for each sample; 0: one row for all elements. Not with sum_first
  const void* strength;  // O[numel], optional: not with sum_first, nor where O is not B

  // Elements that one row covers, with rows of their own.
  std::int64_t span() const { return sample / rows; }
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

// How the terms are multiplied and added: each b_k*h_k rounded to S, or to V; or their sum before it is multiplied.
enum class Terms : int { kToState = 0, kToVelocity = 1, kSumFirst = 2 };

// The wider of two types; float for the two of 16 bits.
template <class X, class Y>
struct Wider {
  using type = std::conditional_t<sizeof(X) == sizeof(Y), float, std::conditional_t<(sizeof(X) > sizeof(Y)), X, Y>>;
};
template <class X>
struct Wider<X, X> {
  using type = X;
};

// The steps of one element.
template <class B_, class V_, class O_, Terms kTerms>
struct Element {
  using B = B_;
  using V = V_;
  using O = O_;
  using S = typename Wider<B, O>::type;
  using A = Arithmetic<S>;
  using Weight = Arithmetic<V>;  // guidance weights: float for a float velocity, whatever the state is
  static constexpr bool kSumFirst = kTerms == Terms::kSumFirst;

  // h0, guided: w0*u + w1*v
  static FLOWMATCH_INLINE V weighted(Weight w0, V u, Weight w1, V v) { return sum(product(w0, u), product(w1, v)); }
  // h0, guided: x + w1*(v - u), where x is u or v. v - u is v + (-u), to the bit.
  static FLOWMATCH_INLINE V from(V x, Weight w1, V v, V u) {
    return sum(x, product(w1, To<V>::narrow(add(widen(v), -widen(u)))));
  }
  // b_k as it enters the product.
  static FLOWMATCH_INLINE A coefficient(A b, Rounding rounding) {
    if constexpr (kTerms == Terms::kToVelocity && !std::is_same_v<A, V>) {
      const A rounded = static_cast<A>(widen(To<V>::narrow(b)));
      return rounding == Rounding::kRounded ? rounded : b;
    }
    return b;
  }
  // a*base
  static FLOWMATCH_INLINE S start(A a, B base) { return To<S>::narrow(multiply(a, static_cast<A>(widen(base)))); }
  // out + b_k*h_k
  static FLOWMATCH_INLINE S accumulate(S out, A b, A h) { return plus(out, term(b, h)); }
  static constexpr bool kHasStrength = !kSumFirst && std::is_same_v<B, O>;
  // out + (b_0*h_0)*strength
  static FLOWMATCH_INLINE S accumulate(S out, A b, A h, S strength) {
    const S scaled = To<S>::narrow(multiply(term(b, h), static_cast<A>(widen(strength))));
    return plus(out, static_cast<A>(widen(scaled)));
  }
  // With sum_first: b_k*h_k, the oldest; h2 + h1; and base + (sum * a) * c. `accumulate` adds the other terms.
  static FLOWMATCH_INLINE S oldest(A b, A h) { return To<S>::narrow(multiply(b, h)); }
  static FLOWMATCH_INLINE A pair(A h2, A h1) { return static_cast<A>(widen(To<S>::narrow(add(h2, h1)))); }
  static FLOWMATCH_INLINE S stepped(B base, S sum, A a, A c) {
    const A step = static_cast<A>(widen(oldest(static_cast<A>(widen(sum)), a)));
    return accumulate(To<S>::narrow(static_cast<A>(widen(base))), c, step);
  }
  // out as it is stored.
  static FLOWMATCH_INLINE O stored(S out) {
    if constexpr (std::is_same_v<S, O>) return out;
    return To<O>::narrow(widen(out));
  }
  // h0 + c*base
  static FLOWMATCH_INLINE A remember(A h0, A c, B base) {
    if constexpr (kSumFirst) return h0;
    const A shifted = add(h0, multiply(c, static_cast<A>(widen(base))));
    return c != A(0) ? shifted : h0;
  }

 private:
  // b_k*h_k
  static FLOWMATCH_INLINE A term(A b, A h) {
    using P = std::conditional_t<kTerms == Terms::kToVelocity, V, S>;
    return static_cast<A>(widen(To<P>::narrow(multiply(b, h))));
  }
  static FLOWMATCH_INLINE S plus(S out, A term) { return To<S>::narrow(add(static_cast<A>(widen(out)), term)); }
  static FLOWMATCH_INLINE V product(Weight w, V v) { return To<V>::narrow(multiply(w, widen(v))); }
  static FLOWMATCH_INLINE V sum(V x, V y) { return To<V>::narrow(add(widen(x), widen(y))); }
};

// Calls f(Element<B, V, O, kTerms>{}) for the dtypes; false where there is no such element: V would widen S, out has
// the velocity's dtype without products rounded to it, or a sum_first velocity is not of the state's dtype.
template <class F>
bool dispatch(Dtypes dtypes, Rounding rounding, bool sum_first, F&& f) {
  const bool to_state = rounding == Rounding::kPromote && dtypes.velocity != dtypes.base;
  const Terms terms = sum_first ? Terms::kSumFirst : to_state ? Terms::kToState : Terms::kToVelocity;
#define FLOWMATCH_ELEMENT(B, V, O, TERMS)                                                                            \
  if (dtypes.base == Dtype::k##B && dtypes.velocity == Dtype::k##V && dtypes.out == Dtype::k##O && terms == TERMS) { \
    f(Element<B, V, O, TERMS>{});                                                                                    \
    return true;                                                                                                     \
  }
// A velocity of the state's dtype; a narrower one; and one whose dtype out takes from the state.
#define FLOWMATCH_SAME(S)                        \
  FLOWMATCH_ELEMENT(S, S, S, Terms::kToVelocity) \
  FLOWMATCH_ELEMENT(S, S, S, Terms::kSumFirst)
#define FLOWMATCH_NARROWER(S, V)              \
  FLOWMATCH_ELEMENT(S, V, S, Terms::kToState) \
  FLOWMATCH_ELEMENT(S, V, S, Terms::kToVelocity)
#define FLOWMATCH_TAKEN(B, V) FLOWMATCH_ELEMENT(B, V, V, Terms::kToVelocity)
  FLOWMATCH_SAME(Float32)
  FLOWMATCH_SAME(Float64)
  FLOWMATCH_SAME(BFloat16)
  FLOWMATCH_SAME(Float16)
  FLOWMATCH_NARROWER(Float32, BFloat16)
  FLOWMATCH_NARROWER(Float32, Float16)
  FLOWMATCH_NARROWER(Float64, Float32)
  FLOWMATCH_NARROWER(Float64, BFloat16)
  FLOWMATCH_NARROWER(Float64, Float16)
  FLOWMATCH_TAKEN(Float32, BFloat16)
  FLOWMATCH_TAKEN(Float32, Float16)
  FLOWMATCH_TAKEN(BFloat16, Float32)
  FLOWMATCH_TAKEN(BFloat16, Float16)
  FLOWMATCH_TAKEN(Float16, Float32)
  FLOWMATCH_TAKEN(Float16, BFloat16)
#undef FLOWMATCH_ELEMENT
#undef FLOWMATCH_SAME
#undef FLOWMATCH_NARROWER
#undef FLOWMATCH_TAKEN
  return false;
}

}  // namespace flowmatch_kernels

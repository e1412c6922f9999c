// The arithmetic of keyed noise, one counter of Philox at a time, for every C++ backend.
//
//   words = Philox4x32-10(key = seed, counter = (element / 4, sample, stream, evaluation))
//   z     = Box-Muller(words[0], words[1]), Box-Muller(words[2], words[3])
//
// Integer steps, and float32 products, sums and square roots, each rounded by itself: the bits are the same on every
// machine. flowmatch_kernels/ops/keyed_noise.py is the contract, with the layout of the counter, and
// ops/reference_noise.py the definition; names agree.
// Knows nothing of Python or PyTorch. Compile without contraction (-ffp-contract=off).
#pragma once

#include <cmath>
#include <cstdint>

#include "fused_step.h"

namespace flowmatch_kernels {

// What a draw writes and reads. Every tensor is contiguous.
struct NoiseOperands {
  void* out;                 // T[samples, elements]
  const std::int64_t* keys;  // [samples, 3]: the bits of the seed, the index of the sample, the stream; from bit 16 on
                             // of the stream the evaluation, to which the one below is joined
  std::int64_t samples;
  std::int64_t elements;  // of one sample
  std::int64_t evaluation;
};

// Counters of one sample: four elements each, the last one fewer.
constexpr std::int64_t blocks_of(std::int64_t elements) { return (elements + 3) / 4; }

// ---- Philox4x32-10 (Salmon et al., SC 2011) ----

struct Words {
  std::uint32_t w[4];
};

constexpr std::uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

FLOWMATCH_INLINE Words philox(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3, std::uint32_t k0,
                              std::uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = static_cast<std::uint64_t>(kMultiplier0) * c0;
    const std::uint64_t p1 = static_cast<std::uint64_t>(kMultiplier1) * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(p1);
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(p0);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {c0, c1, c2, c3};
}

// The counter's words that one sample has in common, and its key.
struct Counter {
  std::uint32_t c1, c2, c3, k0, k1;
};

FLOWMATCH_INLINE Counter counter(const std::int64_t* key, std::int64_t evaluation, std::int64_t block) {
  const auto seed = static_cast<std::uint64_t>(key[0]), index = static_cast<std::uint64_t>(key[1]);
  return {.c1 = static_cast<std::uint32_t>((static_cast<std::uint64_t>(block) >> 32) | (index >> 32 << 16)),
          .c2 = static_cast<std::uint32_t>(key[2] | (evaluation << 16)),
          .c3 = static_cast<std::uint32_t>(index),
          .k0 = static_cast<std::uint32_t>(seed),
          .k1 = static_cast<std::uint32_t>(seed >> 32)};
}

// ---- float32, each operation rounded by itself ----

struct Single {
  float x;
  FLOWMATCH_INLINE constexpr Single(float value) : x(value) {}  // of a literal too
};
FLOWMATCH_INLINE Single operator*(Single x, Single y) { return {multiply(x.x, y.x)}; }
FLOWMATCH_INLINE Single operator+(Single x, Single y) { return {add(x.x, y.x)}; }
FLOWMATCH_INLINE Single operator-(Single x, Single y) { return {add(x.x, -y.x)}; }
FLOWMATCH_INLINE Single operator-(Single x) { return {-x.x}; }
// x * y + z of an x * y that float32 holds: an FMA, where there is one, has the same bits.
template <bool kFma>
FLOWMATCH_INLINE Single add_exact_product(Single x, Single y, Single z) {
  if constexpr (kFma) return {__builtin_fmaf(x.x, y.x, z.x)};
  return x * y + z;
}
FLOWMATCH_INLINE Single choose(bool condition, Single x, Single y) { return {condition ? x.x : y.x}; }
FLOWMATCH_INLINE Single square_root(Single x) {
#if defined(__CUDA_ARCH__)
  return {__fsqrt_rn(x.x)};
#else
  return {__builtin_sqrtf(x.x)};  // one instruction: compile with -fno-math-errno
#endif
}

// An unevaluated sum, |low| <= half an ulp of high.
struct Twofold {
  Single high, low;
};
// x + y, exactly; |x| >= |y|, or x is 0.
FLOWMATCH_INLINE Twofold sum(Single x, Single y) {
  const Single high = x + y;
  return {high, y - (high - x)};
}
// The leading 12 bits of x, and the rest: products of two such parts are exact.
FLOWMATCH_INLINE Twofold halves(Single x) {
  const Single high = {float_of(float_bits(x.x) & 0xfffff000u)};
  return {high, x - high};
}

// x - root * root, which float32 holds where root is the square root of x, rounded: again an FMA has the same bits.
template <bool kFma>
FLOWMATCH_INLINE Single remainder(Single x, Single root) {
  if constexpr (kFma) return {__builtin_fmaf(-root.x, root.x, x.x)};
  const Twofold part = halves(root);
  return ((x - part.high * part.high) - (part.high + part.high) * part.low) - part.low * part.low;
}

// ---- Box-Muller ----

// -2 ln u, u being the uniform of a word: (word + 1/2) / 2^32, where its distance from the nearer of 0 and 1 is rounded
// to float32.
FLOWMATCH_INLINE Twofold minus_twice_logarithm(std::uint32_t word) {
  const bool upper = static_cast<std::int32_t>(word) < 0;
  const std::uint32_t k = upper ? ~word : word;          // below 2^31
  const float distance = static_cast<float>(2 * k + 1);  // of u from the nearer end, times 2^33
  // -ln u = n ln 2 - ln(1 + f), f within [sqrt(1/2) - 1, sqrt(2) - 1], exactly. Lower half: u = 2^-n (1 + f).
  const std::uint32_t bits = float_bits(distance) + (0x3f800000u - 0x3f3504f3u);
  const Single mantissa = {float_of((bits & 0x007fffffu) + 0x3f3504f3u)};
  const auto exponent = static_cast<std::int32_t>(bits >> 23) - 127;
  // Upper half: u = 1 - d, which is 1 + f near 1, else (1 + f) / 2.
  const Single d = Single{distance} * 0x1p-33f;
  const bool near = distance < 2515933696.0f;  // (1 - sqrt(1/2)) * 2^33
  const Single f = choose(upper, choose(near, -d, 1.0f - (d + d)), mantissa - 1.0f);
  const std::int32_t n = upper ? (near ? 0 : 1) : 33 - exponent;
  const Single times = {static_cast<float>(n)};

  const Single square = f * f;
  Single p = 0.06918781250715256f;
  p = p * f + -0.11794884502887726f;
  p = p * f + 0.1187414899468422f;
  p = p * f + -0.12383755296468735f;
  p = p * f + 0.14218482375144958f;
  p = p * f + -0.16669267416000366f;
  p = p * f + 0.20002231001853943f;
  p = p * f + -0.24999986588954926f;
  p = p * f + 0.3333331048488617f;
  // ln 2 in two parts, the first of 10 bits, so that n times it is exact.
  const Single rest = (0.5f * square - (f * square) * p) + times * -2.12194442e-4f;
  const Twofold leading = sum(times * 0.693359375f, -f);
  const Twofold minus_ln = sum(leading.high, leading.low + rest);
  return {minus_ln.high + minus_ln.high, minus_ln.low + minus_ln.low};
}

// The square root, and what it leaves, by one step of Newton's from half a percent of 1/sqrt.
template <bool kFma>
FLOWMATCH_INLINE Twofold radius(Twofold square) {
  const Single root = square_root(square.high);
  const Single left = remainder<kFma>(square.high, root) + square.low;
  Single inverse = {float_of(0x5f3759dfu - (float_bits(square.high.x) >> 1))};
  inverse = inverse * (1.5f - ((0.5f * square.high) * inverse) * inverse);
  return {root, (0.5f * left) * inverse};
}

// high * high + ..., rounded once but for a thousandth of an ulp.
template <bool kFma>
FLOWMATCH_INLINE Single product(Twofold x, Twofold y) {
  const Single high = x.high * y.high;
  const Twofold a = halves(x.high), b = halves(y.high);
  const Single leading = add_exact_product<kFma>(a.high, b.high, -high);
  const Single mixed = add_exact_product<kFma>(a.high, b.low, a.low * b.high);
  const Single error = add_exact_product<kFma>(a.low, b.low, leading + mixed);
  return high + (error + (x.high * y.low + x.low * y.high));
}

// Two normals: a radius times cosine and sine of (angle + 1/2) / 2^32 of a turn, where the distance from the nearest
// quarter turn is rounded to float32.
template <bool kFma>
FLOWMATCH_INLINE void turn(Twofold r, std::uint32_t angle, float& z0, float& z1) {
  const std::uint32_t quarter = (angle + 0x20000000u) >> 30;
  const auto offset = static_cast<std::int32_t>(angle - (quarter << 30));  // in [-2^29, 2^29)
  const Single y = Single{static_cast<float>(2 * offset + 1)} * 0x1p-31f;  // of a quarter turn: [-1/2, 1/2]
  const Single q = y * y;

  Single p = 0.0001247044710908085f;
  p = p * q + -0.004664550069719553f;
  p = p * q + 0.07968997955322266f;
  p = p * q + -0.6459639668464661f;
  p = p * q + 0.07079632580280304f;  // pi/2 - 3/2
  const Twofold three_halves = sum(y, 0.5f * y);
  const Twofold sine = sum(three_halves.high, three_halves.low + y * p);

  p = -0.000904374523088336f;
  p = p * q + 0.020860442891716957f;
  p = p * q + -0.25366926193237305f;
  p = p * q + 0.23370054364204407f;  // pi^2/8 - 1
  const Twofold one_less = sum(1.0f, -q);
  const Twofold cosine = sum(one_less.high, one_less.low - q * p);

  // Turned by the quarters: (c, s), (-s, c), (-c, -s), (s, -c).
  const float on = product<kFma>(r, cosine).x, across = product<kFma>(r, sine).x;
  const bool odd = (quarter & 1u) != 0;
  const float first = odd ? across : on, second = odd ? on : across;
  z0 = float_of(float_bits(first) ^ (((quarter + 1u) & 2u) << 30));
  z1 = float_of(float_bits(second) ^ ((quarter & 2u) << 30));
}

// Two normals of two words.
FLOWMATCH_INLINE void normals(std::uint32_t word, std::uint32_t angle, float& z0, float& z1) {
  turn<false>(radius<false>(minus_twice_logarithm(word)), angle, z0, z1);
}

}  // namespace flowmatch_kernels

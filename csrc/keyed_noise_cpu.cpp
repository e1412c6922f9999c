// Keyed noise on the CPU: strips that stay in the L1 cache, one pass for the words, one for the normals, one to store.
//
// Memory moved per element is the least possible: each is written once. Each loop is compiled for several instruction
// sets, as fused_step_cpu.cpp's are.
#include "keyed_noise_cpu.h"

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace flowmatch_kernels {
namespace {

constexpr std::int64_t kStrip = 256;  // counters

// One strip: by counter its words and the key; then, in their place, the words of Philox.
struct Strip {
  std::uint32_t c[4][kStrip] = {};
  std::uint32_t k[2][kStrip] = {};
};

// An instruction set: whether it has an FMA, and Philox of n counters. With kOneKey they are of one sample, and all but
// their lowest word is at [0] alone.
#if defined(__x86_64__)
// Philox on lanes of 64 bits, of which only the lower halves count; MULTIPLY is their product. Compilers do not find
// that instruction: they multiply 64 bits by 64, which takes six times as long. Each of the ten rounds waits for the
// one before, so CHAINS vectors go through them side by side, as many as there are registers for. It runs to a multiple
// of the lanes of all of them.
#define FLOWMATCH_INSTRUCTION_SET(NAME, FMA, TARGET, LANES, CHAINS, VECTOR, MULTIPLY)                  \
  struct NAME {                                                                                        \
    static constexpr bool kFma = FMA;                                                                  \
    template <bool kOneKey>                                                                            \
    TARGET static void philox(Strip& s, std::int64_t n) {                                              \
      using Wide = std::uint64_t __attribute__((vector_size(8 * (LANES))));                            \
      using Narrow = std::uint32_t __attribute__((vector_size(4 * (LANES))));                          \
      static_assert(kStrip % ((LANES) * (CHAINS)) == 0);                                               \
      const std::uint32_t* const in[6] = {s.c[0], s.c[1], s.c[2], s.c[3], s.k[0], s.k[1]};             \
      Wide first[6];                                                                                   \
      for (int word = 0; word < 6; ++word) first[word] = Wide{} + in[word][0];                         \
      for (std::int64_t j = 0; j < n; j += (LANES) * (CHAINS)) {                                       \
        Wide x[CHAINS][6];                                                                             \
        for (int chain = 0; chain < (CHAINS); ++chain) {                                               \
          for (int word = 0; word < 6; ++word) {                                                       \
            Narrow words;                                                                              \
            std::memcpy(&words, in[word] + j + chain * (LANES), sizeof words);                         \
            x[chain][word] = kOneKey && word > 0 ? first[word] : __builtin_convertvector(words, Wide); \
          }                                                                                            \
        }                                                                                              \
        for (int round = 0; round < 10; ++round) {                                                     \
          for (int chain = 0; chain < (CHAINS); ++chain) {                                             \
            auto& [c0, c1, c2, c3, k0, k1] = x[chain];                                                 \
            const Wide p0 = (Wide)MULTIPLY((VECTOR)(Wide{} + kMultiplier0), (VECTOR)c0);               \
            const Wide p1 = (Wide)MULTIPLY((VECTOR)(Wide{} + kMultiplier1), (VECTOR)c2);               \
            c0 = (p1 >> 32) ^ c1 ^ k0;                                                                 \
            c1 = p1;                                                                                   \
            c2 = (p0 >> 32) ^ c3 ^ k1;                                                                 \
            c3 = p0;                                                                                   \
            k0 += kWeyl0;                                                                              \
            k1 += kWeyl1;                                                                              \
          }                                                                                            \
        }                                                                                              \
        for (int chain = 0; chain < (CHAINS); ++chain) {                                               \
          for (int word = 0; word < 4; ++word) {                                                       \
            const Narrow words = __builtin_convertvector(x[chain][word], Narrow);                      \
            std::memcpy(s.c[word] + j + chain * (LANES), &words, sizeof words);                        \
          }                                                                                            \
        }                                                                                              \
      }                                                                                                \
    }                                                                                                  \
  };
// With a mask, or GCC 12 warns of its own header.
#define FLOWMATCH_MULTIPLY_512(x, y) _mm512_maskz_mul_epu32(0xff, x, y)
FLOWMATCH_INSTRUCTION_SET(Sse2, false, , 2, 2, __m128i, _mm_mul_epu32)
FLOWMATCH_INSTRUCTION_SET(Avx2, true, FLOWMATCH_AVX2, 4, 2, __m256i, _mm256_mul_epu32)
FLOWMATCH_INSTRUCTION_SET(Avx512, true, FLOWMATCH_AVX512, 8, 4, __m512i, FLOWMATCH_MULTIPLY_512)
#else
struct Baseline {
#if defined(__aarch64__)
  static constexpr bool kFma = true;
#else
  static constexpr bool kFma = false;
#endif
  template <bool kOneKey>
  static void philox(Strip& s, std::int64_t n) {
    const Counter first{.c1 = s.c[1][0], .c2 = s.c[2][0], .c3 = s.c[3][0], .k0 = s.k[0][0], .k1 = s.k[1][0]};
    for (std::int64_t j = 0; j < n; ++j) {
      const Counter with =
          kOneKey ? first
                  : Counter{.c1 = s.c[1][j], .c2 = s.c[2][j], .c3 = s.c[3][j], .k0 = s.k[0][j], .k1 = s.k[1][j]};
      const Words words = flowmatch_kernels::philox(s.c[0][j], with.c1, with.c2, with.c3, with.k0, with.k1);
      for (int k = 0; k < 4; ++k) s.c[k][j] = words.w[k];
    }
  }
};
#endif

// The normals of counters [i, i + n), n at most kStrip: four for each.
template <class Set>
FLOWMATCH_INLINE void draw(const NoiseOperands& o, std::int64_t i, std::int64_t n, Strip& s, float* in_order) {
  const std::int64_t blocks = blocks_of(o.elements), start = i % blocks;
  const bool one_key = n <= blocks - start && start >> 32 == (start + n - 1) >> 32;
  for (std::int64_t done = 0, run; done < n; done += run) {  // of counters of one sample
    const std::int64_t b = (i + done) / blocks, block = (i + done) - b * blocks;
    run = std::min(n - done, blocks - block);
    for (std::int64_t j = 0; j < run; ++j) s.c[0][done + j] = static_cast<std::uint32_t>(block + j);
    for (std::int64_t j = 0; j < (one_key ? 1 : run); ++j) {
      const Counter with = counter(o.keys + 3 * b, o.evaluation, block + j);
      s.c[1][done + j] = with.c1;
      s.c[2][done + j] = with.c2;
      s.c[3][done + j] = with.c3;
      s.k[0][done + j] = with.k0;
      s.k[1][done + j] = with.k1;
    }
  }
  one_key ? Set::template philox<true>(s, n) : Set::template philox<false>(s, n);
  // Three loops: each is short enough for a processor to have several of its iterations under way.
  float z[4][kStrip], high[kStrip], low[kStrip];
  for (int k = 0; k < 4; k += 2) {
    for (std::int64_t j = 0; j < n; ++j) {
      const Twofold square = minus_twice_logarithm(s.c[k][j]);
      high[j] = square.high.x;
      low[j] = square.low.x;
    }
    for (std::int64_t j = 0; j < n; ++j) {
      const Twofold r = radius<Set::kFma>({high[j], low[j]});
      high[j] = r.high.x;
      low[j] = r.low.x;
    }
    for (std::int64_t j = 0; j < n; ++j) {
      turn<Set::kFma>({high[j], low[j]}, s.c[k + 1][j], z[k][j], z[k + 1][j]);
    }
  }
  for (std::int64_t j = 0; j < n; ++j) {
    for (int k = 0; k < 4; ++k) in_order[4 * j + k] = z[k][j];
  }
}

template <class T, class Set>
FLOWMATCH_INLINE void strips(const NoiseOperands& o, std::int64_t begin, std::int64_t end) {
  Strip s;
  float in_order[4 * kStrip];
  const std::int64_t blocks = blocks_of(o.elements);
  for (std::int64_t i = begin; i < end; i += kStrip) {
    const std::int64_t n = std::min(kStrip, end - i);
    draw<Set>(o, i, n, s, in_order);
    for (std::int64_t done = 0, run; done < n; done += run) {
      const std::int64_t b = (i + done) / blocks, block = (i + done) - b * blocks;
      run = std::min(n - done, blocks - block);
      const std::int64_t size = std::min(4 * run, o.elements - 4 * block);
      T* out = static_cast<T*>(o.out) + b * o.elements + 4 * block;
      for (std::int64_t j = 0; j < size; ++j) out[j] = To<T>::narrow(in_order[4 * done + j]);
    }
  }
}

// Elements [begin, begin + size): of whole counters, of which those at a sample's end may have fewer than four.
template <class Set>
FLOWMATCH_INLINE void elements(const NoiseOperands& o, std::int64_t begin, std::int64_t size, float* z) {
  Strip s;
  float in_order[4 * kStrip];
  const bool whole = o.elements % 4 == 0;  // then a strip goes on from one sample to the next
  for (std::int64_t done = 0, run; done < size; done += run) {
    const std::int64_t b = (begin + done) / o.elements, element = (begin + done) - b * o.elements, skip = element % 4;
    const std::int64_t left = whole ? size - done : std::min(size - done, o.elements - element);
    const std::int64_t n = std::min(kStrip, blocks_of(skip + left));
    draw<Set>(o, b * blocks_of(o.elements) + element / 4, n, s, in_order);
    run = std::min(left, 4 * n - skip);
    std::memcpy(z + done, in_order + skip, run * sizeof(float));
  }
}

#if defined(__x86_64__)
void elements_sse2(const NoiseOperands& o, std::int64_t begin, std::int64_t size, float* z) {
  elements<Sse2>(o, begin, size, z);
}
FLOWMATCH_AVX2 void elements_avx2(const NoiseOperands& o, std::int64_t begin, std::int64_t size, float* z) {
  elements<Avx2>(o, begin, size, z);
}
FLOWMATCH_AVX512 void elements_avx512(const NoiseOperands& o, std::int64_t begin, std::int64_t size, float* z) {
  elements<Avx512>(o, begin, size, z);
}
template <class T>
void sse2(const NoiseOperands& o, std::int64_t begin, std::int64_t end) {
  strips<T, Sse2>(o, begin, end);
}
template <class T>
FLOWMATCH_AVX2 void avx2(const NoiseOperands& o, std::int64_t begin, std::int64_t end) {
  strips<T, Avx2>(o, begin, end);
}
template <class T>
FLOWMATCH_AVX512 void avx512(const NoiseOperands& o, std::int64_t begin, std::int64_t end) {
  strips<T, Avx512>(o, begin, end);
}
#endif

template <class T>
void with_instruction_set(const NoiseOperands& o, std::int64_t begin, std::int64_t end, int level) {
#if defined(__x86_64__)
  level = std::min(level, instruction_set_level());
  return level == 2 ? avx512<T>(o, begin, end) : level == 1 ? avx2<T>(o, begin, end) : sse2<T>(o, begin, end);
#else
  return strips<T, Baseline>(o, begin, end);
#endif
}

}  // namespace

void keyed_noise_elements(const std::int64_t* keys, std::int64_t elements_of_sample, std::int64_t begin,
                          std::int64_t size, float* z) {
  const NoiseOperands o{.out = nullptr, .keys = keys, .samples = 0, .elements = elements_of_sample, .evaluation = 0};
#if defined(__x86_64__)
  const int level = instruction_set_level();
  return level == 2   ? elements_avx512(o, begin, size, z)
         : level == 1 ? elements_avx2(o, begin, size, z)
                      : elements_sse2(o, begin, size, z);
#else
  return elements<Baseline>(o, begin, size, z);
#endif
}

void keyed_noise_cpu(const NoiseOperands& o, Dtype dtype, std::int64_t begin, std::int64_t end, int level) {
  switch (dtype) {
    case Dtype::kFloat32:
      return with_instruction_set<Float32>(o, begin, end, level);
    case Dtype::kFloat64:
      return with_instruction_set<Float64>(o, begin, end, level);
    case Dtype::kBFloat16:
      return with_instruction_set<BFloat16>(o, begin, end, level);
    case Dtype::kFloat16:
      return with_instruction_set<Float16>(o, begin, end, level);
  }
}

}  // namespace flowmatch_kernels

#include "overlap.h"

namespace flowmatch_kernels {
namespace {

enum Operand { kOut, kSlot, kHistory, kBase, kV, kU, kH1, kH2, kH3, kStrength, kCoefficients, kOperands };
constexpr const char* kNames[] = {"out", "trajectory's slot", "history",     "base", "v", "u", "h1", "h2",
                                  "h3",  "strength",          "coefficients"};

struct Region {
  Operand name;
  std::uintptr_t begin;
  std::int64_t bytes;
};

std::string sentence(const Region& written, const Region& other) {
  constexpr const char* kWanted[] = {", or base itself", "", ", or one of h1, h2, h3 itself"};
  const bool after = written.begin >= other.begin;
  const std::uintptr_t distance = after ? written.begin - other.begin : other.begin - written.begin;
  const std::string name = kNames[other.name];
  return kNames[written.name] + (" overlaps " + name) + ": it begins " + std::to_string(distance) + " bytes " +
         (after ? "after " : "before ") + name + " does; wanted memory of its own" + kWanted[written.name];
}

}  // namespace

std::optional<std::string> overlap(const Operands& o, Dtypes dtypes, const void* coefficients, std::int64_t rows) {
  const std::int64_t A = size_of(arithmetic_of(dtypes.base)), B = size_of(dtypes.base), V = size_of(dtypes.velocity);
  const std::int64_t O = size_of(dtypes.out), n = o.numel;
  Region regions[kOperands];
  int count = 0;
  const auto add = [&](Operand name, const void* memory, std::int64_t bytes) {
    if (memory) regions[count++] = {name, reinterpret_cast<std::uintptr_t>(memory), bytes};
  };
  add(kOut, o.out, n * O);
  if (o.trajectory) {
    const std::int64_t elements = n + (o.slots - 1) * (n - o.sample);
    add(kSlot, static_cast<char*>(o.trajectory) + o.slot * o.sample * O, elements * O);
  }
  add(kHistory, o.history, n * A);
  const int written = count;
  add(kBase, o.base, n * B);
  add(kV, o.v, n * V);
  add(kU, o.u, n * V);
  add(kH1, o.h[0], o.keyed ? n / o.sample * 3 * sizeof(std::int64_t) : n * A);
  for (int k = 1; k < 3; ++k) add(static_cast<Operand>(kH1 + k), o.h[k], n * A);
  add(kStrength, o.strength, n * B);
  add(kCoefficients, coefficients, rows * kColumns * A);
  for (int w = 0; w < written; ++w) {
    const Region& out = regions[w];
    for (int k = w + 1; k < count; ++k) {
      const Region& other = regions[k];
      if (out.begin + out.bytes <= other.begin || other.begin + other.bytes <= out.begin) continue;
      const bool named = out.name == kOut
                             ? other.name == kBase && dtypes.out == dtypes.base
                             : out.name == kHistory && other.name >= (o.keyed ? kH2 : kH1) && other.name <= kH3;
      if (!named || out.begin != other.begin) return sentence(out, other);
    }
  }
  return std::nullopt;
}

}  // namespace flowmatch_kernels

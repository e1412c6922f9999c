// Runs one fused step where its memory is: on torch's threads, or on a GPU's current stream.
#pragma once

#include <optional>
#include <string>

#include "fused_step.h"

namespace flowmatch_kernels {

// Elements below which a second thread, or giving up Python's lock, costs more than it saves.
constexpr std::int64_t kGrain = 32768;

// The same of counters of keyed noise: 20 us of work.
constexpr std::int64_t kGrainCounters = 2048;

// Elements of a step below which it is.
inline std::int64_t grain(const Operands& o) { return o.keyed ? 4 * kGrainCounters : kGrain; }

const char* name_of(Dtype dtype);

// How many rows of their own each sample of a state has, where R rows cover it; none where R is no product of its first
// sizes, from the samples on, so that each row covers a span of consecutive elements.
template <class Sizes>
std::optional<std::uint32_t> rows_of_sample(const Sizes& sizes, std::int64_t dims, std::int64_t R) {
  std::int64_t product = 1;
  for (std::int64_t d = 0; d < dims; ++d) {
    product *= sizes[d];
    if (product == R) return R ? static_cast<std::uint32_t>(R / sizes[0]) : 1;
  }
  return std::nullopt;
}

// Why dtypes do not go together, or none. flowmatch_kernels.ops.fused_step.check_dtypes is the same, in the same words.
std::optional<std::string> mismatch(Dtypes dtypes, Rounding rounding, bool sum_first);

// On the CPU, by as many threads of torch's pool as are worth it. Throws where the dtypes do not go together.
void launch_cpu(const Operands& o, Dtypes dtypes);

// On the current stream of `device`; does not wait for it. It lives in flowmatch_kernels._C_cuda, which hands it over
// in a capsule of this name.
using LaunchCuda = void(const Operands& o, Dtypes dtypes, int device);
constexpr const char* kLaunchCudaCapsule = "flowmatch_kernels.launch_cuda";

// The same of keyed noise and of step_log_prob.
struct NoiseOperands;
using LaunchNoiseCuda = void(const NoiseOperands& o, Dtype dtype, int device);
constexpr const char* kLaunchNoiseCudaCapsule = "flowmatch_kernels.launch_noise_cuda";
struct LogProbOperands;
using LaunchLogProbCuda = void(const LogProbOperands& o, Dtype base, Dtype velocity, int device);
constexpr const char* kLaunchLogProbCudaCapsule = "flowmatch_kernels.launch_log_prob_cuda";

}  // namespace flowmatch_kernels

// The `cpu` backend of keyed noise; see keyed_noise.h for the arithmetic.
#pragma once

#include "instruction_set.h"
#include "keyed_noise.h"

namespace flowmatch_kernels {

// Counters [begin, end) of samples * blocks_of(elements), on the calling thread, by the widest instruction set of this
// machine that is not beyond `level`.
void keyed_noise_cpu(const NoiseOperands& o, Dtype dtype, std::int64_t begin, std::int64_t end, int level = kWidest);

// Elements [begin, begin + size) of the noise [samples, elements] that keys draw, in float32.
void keyed_noise_elements(const std::int64_t* keys, std::int64_t elements, std::int64_t begin, std::int64_t size,
                          float* z);

}  // namespace flowmatch_kernels

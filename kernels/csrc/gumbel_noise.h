// Gumbel noise; described in softgrpo_kernels/gumbel_noise.py.
#pragma once
#include "noise.h"

namespace softgrpo {

struct GumbelNoise {
  float* out;            // [rows, width]
  const int32_t* ids;    // [rows, width]
  const int64_t* seed;   // [rows], as are the next three
  const int64_t* position;
  const int64_t* uid;
  const int64_t* stream;
  int64_t rows, width;
};
void gumbel_noise(const GumbelNoise& args);

}  // namespace softgrpo

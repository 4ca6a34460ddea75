// Gumbel noise: the bits laid down in softgrpo_kernels/noise.py.
#pragma once
#include <cstdint>

namespace softgrpo {

// Key and counter of one row; the fourth counter word is the token id.
struct NoiseKey {
  int64_t seed;
  uint32_t position, uid, stream;
};

// Attempts of a Gamma number.
constexpr uint32_t kGammaAttempts = 8;

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

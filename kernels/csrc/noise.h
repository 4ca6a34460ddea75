// What the noise of a row depends on: the bits are laid down in softgrpo_kernels/noise.py.
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

}  // namespace softgrpo

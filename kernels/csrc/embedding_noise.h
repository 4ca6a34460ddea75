// Gaussian noise on embeddings; described in softgrpo_kernels/embedding_noise.py.
#pragma once
#include "noise.h"

namespace softgrpo {

struct EmbeddingNoise {
  float* out;           // [rows, size]
  const int64_t* seed;  // [rows], as are the next three
  const int64_t* position;
  const int64_t* uid;
  const int64_t* stream;
  int64_t rows, size;
};
void embedding_noise(const EmbeddingNoise& args);

}  // namespace softgrpo

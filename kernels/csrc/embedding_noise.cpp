#include "embedding_noise.h"

#define SOFTGRPO_KERNEL "embedding_noise.inc"
#include "shared/each_isa.h"

namespace softgrpo {

void embedding_noise(const EmbeddingNoise& a) {
  const auto kernel = SOFTGRPO_BEST(normal_of_dimensions);
#pragma omp parallel for schedule(static) if (a.rows * a.size > 4096)
  for (int64_t row = 0; row < a.rows; ++row)
    kernel(a.out + row * a.size, a.size,
           {a.seed[row], static_cast<uint32_t>(a.position[row]), static_cast<uint32_t>(a.uid[row]),
            static_cast<uint32_t>(a.stream[row])});
}

}  // namespace softgrpo

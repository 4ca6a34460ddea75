#include "embedding_noise.h"

#include <numeric>
#include <vector>

#define SOFTGRPO_KERNEL "noise.inc"
#include "shared/each_isa.h"

namespace softgrpo {

void embedding_noise(const EmbeddingNoise& a) {
  const auto kernel = SOFTGRPO_BEST(normal_of_ids);
  std::vector<int32_t> dimensions(a.size);
  std::iota(dimensions.begin(), dimensions.end(), 0);
#pragma omp parallel for schedule(static) if (a.rows * a.size > 4096)
  for (int64_t row = 0; row < a.rows; ++row)
    kernel(a.out + row * a.size, dimensions.data(), a.size,
           {a.seed[row], static_cast<uint32_t>(a.position[row]), static_cast<uint32_t>(a.uid[row]),
            static_cast<uint32_t>(a.stream[row])});
}

}  // namespace softgrpo

#include "gumbel_noise.h"

#define SOFTGRPO_KERNEL "gumbel_noise.inc"
#include "shared/each_isa.h"

namespace softgrpo {

void gumbel_noise(const GumbelNoise& a) {
  const auto kernel = SOFTGRPO_BEST(gumbel_of_ids);
#pragma omp parallel for schedule(static) if (a.rows * a.width > 4096)
  for (int64_t row = 0; row < a.rows; ++row)
    kernel(a.out + row * a.width, a.ids + row * a.width, a.width,
           {a.seed[row], static_cast<uint32_t>(a.position[row]), static_cast<uint32_t>(a.uid[row]),
            static_cast<uint32_t>(a.stream[row])});
}

}  // namespace softgrpo

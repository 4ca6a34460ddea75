#include "soft_embedding.h"

#include "shared/half.h"

#define SOFTGRPO_KERNEL "soft_embedding.inc"
#include "shared/each_isa.h"

namespace softgrpo {

void soft_embedding_row(void* out, const int32_t* ids, const float* weights, int64_t slots,
                        const EmbeddingTable& table) {
  const auto kernel = table.dtype == kFloat32    ? SOFTGRPO_BEST(mix_row<float>)
                      : table.dtype == kBfloat16 ? SOFTGRPO_BEST(mix_row<Bf16>)
                                                 : SOFTGRPO_BEST(mix_row<Half>);
  kernel(out, ids, weights, slots, table);
}

void soft_embedding(void* out, const int32_t* ids, const float* weights, int64_t rows,
                    int64_t slots, const EmbeddingTable& table) {
  const int64_t row_bytes = table.width * (table.dtype == kFloat32 ? 4 : 2);
#pragma omp parallel for schedule(static) if (rows * table.width > (1 << 15))
  for (int64_t row = 0; row < rows; ++row)
    soft_embedding_row(static_cast<char*>(out) + row * row_bytes, ids + row * slots,
                       weights + row * slots, slots, table);
}

}  // namespace softgrpo

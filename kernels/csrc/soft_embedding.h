// Mixtures of embeddings; described in softgrpo_kernels/soft_embedding.py.
#pragma once
#include <cstdint>

namespace softgrpo {

enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

struct EmbeddingTable {
  const void* weights;  // null: none
  int64_t stride, width;
  Dtype dtype;
};

// out [width] of one row of slots.
void soft_embedding_row(void* out, const int32_t* ids, const float* weights, int64_t slots,
                        const EmbeddingTable& table);

void soft_embedding(void* out, const int32_t* ids, const float* weights, int64_t rows,
                    int64_t slots, const EmbeddingTable& table);

}  // namespace softgrpo

// A linear layer for inference with a packed weight; described in softgrpo_engine/ops/packed_linear.py.
#pragma once
#include <cstdint>

namespace softgrpo {

// The weight is packed in tiles of 16 output columns and all of the width: [tile][k][16] fp32, or
// [tile][k / 2][16][2] bf16, which is what the matrix units read.
constexpr int64_t kTileColumns = 16;
constexpr int64_t kBlockColumns = 2 * kTileColumns;
constexpr int64_t kBlockRows = 32;

struct Linear {
  void* out;
  const void* x;
  const void* weight;  // packed, of an even number of tiles
  const float* bias;   // null: none; in the order and number of the packed columns
  int64_t rows, width, columns;
  bool silu_mul;  // tiles alternate between gate and up; `columns` counts those of both
};

void pack_linear(void* packed, const void* weight, int64_t columns, int64_t width, bool bf16);
void linear(const Linear& args, bool bf16);

// What multiplies bf16 here: "amx", "avx512_bf16", or "" for fp32 lanes.
const char* matrix_unit();
// For tests: 0 lanes, 1 AVX512-BF16, 2 AMX, as far as the machine has them.
void limit_matrix_unit(int level);

}  // namespace softgrpo

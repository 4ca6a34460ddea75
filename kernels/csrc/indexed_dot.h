// Dot products with selected rows of a table, and the sums of their gradients over rows of it.
// Arguments are described in softgrpo_kernels/indexed_dot.py.
#pragma once
#include <cstdint>

#include "soft_embedding.h"

namespace softgrpo {

struct IndexedDot {
  float* out;         // [rows, slots]
  const void* hidden;  // [rows, table.width], of the table's dtype
  int64_t hidden_stride;
  const int32_t* ids;  // [rows, slots], < 0: no row of the table, the product is 0
  int64_t rows, slots;
  EmbeddingTable table;
};

void indexed_dot(const IndexedDot& args);

// Writes the used (id, row * slots + slot) pairs as id << 32 | position, ascending, and returns how
// many there are; `keys` and `spare` have `count` elements each.
int64_t sort_ids(uint64_t* keys, uint64_t* spare, const int32_t* ids, int64_t count);

struct SegmentSums {
  void* out;  // one row of `width` per distinct id (compact), or the table's gradient
  int64_t* row_ids;  // compact only: the id of each row; null: add to out[id]
  int64_t out_stride;
  Dtype out_dtype;
  const uint64_t* keys;  // [pairs], of sort_ids
  int64_t pairs;
  const float* grad;   // [rows, slots]
  const void* hidden;  // [rows, width]
  int64_t slots, hidden_stride, width;
  Dtype hidden_dtype;
};

// For every distinct id, sum over its pairs in order of grad[row, slot] hidden[row].
void segment_sums(const SegmentSums& args);

}  // namespace softgrpo

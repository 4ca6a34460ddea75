// Attention over paged keys and values; described in softgrpo_engine/ops/paged_attention.py. Bad
// indices throw std::invalid_argument.
#pragma once
#include <cstdint>

#include "max_head_dim.h"

namespace softgrpo {

struct PagedAttention {
  void* out;
  const void* q;
  const void* k_pages;
  const void* v_pages;
  const int32_t* block_table;
  const int32_t* seq_lens;
  const int32_t* query_starts;  // null: row b is the one query of sequence b
  int64_t rows, sequences, table_width, num_pages, page_size, num_heads, num_kv_heads, head_dim;
  float scale;
};
void paged_attention(const PagedAttention& args, bool bf16);

// What the kernels and their driver share.

// Keys are taken in chunks (one running-softmax step), chunks in splits (what may be computed in
// parallel, then merged in order). Both are cut at fixed positions of the sequence, whatever the
// thread count: a row's bits depend on its own keys alone.
constexpr int64_t kChunk = 128;
constexpr int64_t kSplit = 512;
// Query rows (queries x heads of a KV head) that share each load of K and V.
constexpr int64_t kRows = 48;

// Consecutive queries of one sequence.
struct QueryBlock {
  int64_t sequence;
  int64_t first_row;       // of q and out
  int64_t first_position;  // in the sequence
  int64_t queries;
  int64_t keys() const { return first_position + queries; }
  int64_t splits() const { return (keys() + kSplit - 1) / kSplit; }
};

// At most kChunk keys of a block's sequence, for one KV head.
struct KeyChunk {
  const QueryBlock* block;  // null: none
  int64_t kv_head, first, keys;
};

inline KeyChunk chunk_at(const QueryBlock& block, int64_t kv_head, int64_t first) {
  const int64_t left = block.keys() - first;
  return {&block, kv_head, first, left < kChunk ? left : kChunk};
}

// Softmax in progress of the rows of one block and KV head: maximum, denominator, numerator.
struct SoftmaxState {
  float* maximum;      // [rows]
  float* denominator;  // [rows]
  float* values;       // [rows, padded_dim]
};

// `values` everywhere hold their dimensions in the order of FloatPair.
struct ChunkScratch {
  float* queries;  // [rows, head_dim]
  float* keys;     // [head_dim, kLanes], transposed
  float* scores;   // [rows, kChunk]
  float* values;   // [kChunk, padded_dim]
};

// A multiple of the width that the value loop takes at a time.
inline int64_t padded_dim(int64_t head_dim) { return (head_dim + 63) / 64 * 64; }

}  // namespace softgrpo

// The decoder's inference ops; arguments are described in softgrpo_engine/ops.
// T is float or bf16 (bf16 == true). Bad indices throw std::invalid_argument.
#pragma once
#include <cstdint>

namespace softgrpo {

constexpr int64_t kMaxHeadDim = 1024;

// residual and total are null together: then x itself is normalised. They may be one tensor.
void rms_norm(void* out, void* total, const void* x, const void* residual, const void* weight,
              int64_t rows, int64_t hidden, float eps, bool bf16);

// The same norm, in place, over every head of q and of k in qkv [rows, (Hq + 2 Hkv) D].
void normalise_heads(void* qkv, const void* q_norm, const void* k_norm, int64_t rows,
                     int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, float eps,
                     bool bf16);

void silu_mul(void* out, const void* gate_up, int64_t rows, int64_t width, bool bf16);

struct RopeStore {
  void* q;
  void* k_pages;
  void* v_pages;
  const void* qkv;
  const float* cos;
  const float* sin;
  const int64_t* slots;
  int64_t rows, num_heads, num_kv_heads, head_dim, num_pages, page_size;
};
void rope_store_kv(const RopeStore& args, bool bf16);

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

}  // namespace softgrpo

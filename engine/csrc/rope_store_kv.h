// Rotary positions, and keys and values into their pages; described in
// softgrpo_engine/ops/rope_store_kv.py. A bad slot throws std::invalid_argument.
#pragma once
#include <cstdint>

#include "max_head_dim.h"

namespace softgrpo {

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

}  // namespace softgrpo

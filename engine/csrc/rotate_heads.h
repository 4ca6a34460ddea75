// RoPE in training, keys and values copied to where attention reads them; described in
// softgrpo_engine/ops/gpu/rotate_heads.py. A bad place throws std::invalid_argument.
#pragma once
#include <cstdint>

#include "max_head_dim.h"

namespace softgrpo {

// Heads, or their gradients: q [rows, Hq, D]; k, v [count, Hkv, D]; qkv [rows, (Hq + 2 Hkv) D].
struct RotateHeads {
  void* q;
  void* k;
  void* v;
  void* qkv;
  const float* cos;
  const float* sin;
  const int32_t* copy_starts;
  const int32_t* copies;
  int64_t rows, count, num_heads, num_kv_heads, head_dim;
};

void rotate_heads(const RotateHeads& args, bool bf16);           // writes q, k and v
void rotate_heads_backward(const RotateHeads& args, bool bf16);  // writes qkv

}  // namespace softgrpo

// Root-mean-square norm; described in softgrpo_engine/ops/rms_norm.py. Tensors are float or, with
// bf16, bfloat16, here and in the other ops.
#pragma once
#include <cstdint>

namespace softgrpo {

// residual and total are null together: then x itself is normalised. They may be one tensor.
void rms_norm(void* out, void* total, const void* x, const void* residual, const void* weight,
              int64_t rows, int64_t hidden, float eps, bool bf16);

// The gradient of total, d_sum (or null) added. d_weights [parts, hidden], zeros, or null: the weight's
// by parts of the rows, so that their sum does not hang on the threads.
void rms_norm_backward(void* d_total, float* d_weights, const void* d_out, const void* d_sum,
                       const void* total, const void* weight, int64_t rows, int64_t hidden,
                       int64_t parts, float eps, bool bf16);

// The same norm, in place, over every head of q and of k in qkv [rows, (Hq + 2 Hkv) D].
void normalise_heads(void* qkv, const void* q_norm, const void* k_norm, int64_t rows,
                     int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, float eps,
                     bool bf16);

}  // namespace softgrpo

// The activation of SwiGLU; described in softgrpo_engine/ops/silu_mul.py. Rows of gate and of up are
// `stride` elements apart.
#pragma once
#include <cstdint>

namespace softgrpo {

void silu_mul(void* out, const void* gate, const void* up, int64_t stride, int64_t rows,
              int64_t width, bool bf16);

// Gradients [rows, 2 width] of gate and of up, side by side.
void silu_mul_backward(void* d_gate_up, const void* d_out, const void* gate, const void* up,
                       int64_t stride, int64_t rows, int64_t width, bool bf16);

}  // namespace softgrpo

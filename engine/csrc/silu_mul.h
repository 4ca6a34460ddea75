// The activation of SwiGLU; described in softgrpo_engine/ops/silu_mul.py.
#pragma once
#include <cstdint>

namespace softgrpo {

void silu_mul(void* out, const void* gate_up, int64_t rows, int64_t width, bool bf16);

}  // namespace softgrpo

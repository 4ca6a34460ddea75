#include "silu_mul.h"

#include "for_each_row.h"

#define SOFTGRPO_KERNEL "silu_mul.inc"
#include "shared/each_isa.h"

namespace softgrpo {
namespace {

template <class T>
void silu_mul_rows(T* out, const T* gate_up, int64_t rows, int64_t width) {
  const auto kernel = SOFTGRPO_BEST(silu_mul_row<T>);
  for_each_row(rows, width, [=](int64_t row) {
    const T* gate = gate_up + row * 2 * width;
    kernel(out + row * width, gate, gate + width, width);
  });
}

}  // namespace

void silu_mul(void* out, const void* gate_up, int64_t rows, int64_t width, bool bf16) {
  if (bf16)
    silu_mul_rows(static_cast<Bf16*>(out), static_cast<const Bf16*>(gate_up), rows, width);
  else
    silu_mul_rows(static_cast<float*>(out), static_cast<const float*>(gate_up), rows, width);
}

}  // namespace softgrpo

#include "silu_mul.h"

#include "for_each_row.h"

#define SOFTGRPO_KERNEL "silu_mul.inc"
#include "shared/each_isa.h"

namespace softgrpo {
namespace {

template <class T>
void silu_mul_rows(T* out, const T* gate, const T* up, int64_t stride, int64_t rows,
                   int64_t width) {
  const auto kernel = SOFTGRPO_BEST(silu_mul_row<T>);
  for_each_row(rows, width, [=](int64_t row) {
    kernel(out + row * width, gate + row * stride, up + row * stride, width);
  });
}

template <class T>
void silu_mul_backward_rows(T* d_gate_up, const T* d_out, const T* gate, const T* up,
                            int64_t stride, int64_t rows, int64_t width) {
  const auto kernel = SOFTGRPO_BEST(silu_mul_backward_row<T>);
  for_each_row(rows, width, [=](int64_t row) {
    T* d_gate = d_gate_up + row * 2 * width;
    kernel(d_gate, d_gate + width, d_out + row * width, gate + row * stride, up + row * stride,
           width);
  });
}

}  // namespace

void silu_mul(void* out, const void* gate, const void* up, int64_t stride, int64_t rows,
              int64_t width, bool bf16) {
  if (bf16)
    silu_mul_rows(static_cast<Bf16*>(out), static_cast<const Bf16*>(gate),
                  static_cast<const Bf16*>(up), stride, rows, width);
  else
    silu_mul_rows(static_cast<float*>(out), static_cast<const float*>(gate),
                  static_cast<const float*>(up), stride, rows, width);
}

void silu_mul_backward(void* d_gate_up, const void* d_out, const void* gate, const void* up,
                       int64_t stride, int64_t rows, int64_t width, bool bf16) {
  if (bf16)
    silu_mul_backward_rows(static_cast<Bf16*>(d_gate_up), static_cast<const Bf16*>(d_out),
                           static_cast<const Bf16*>(gate), static_cast<const Bf16*>(up), stride,
                           rows, width);
  else
    silu_mul_backward_rows(static_cast<float*>(d_gate_up), static_cast<const float*>(d_out),
                           static_cast<const float*>(gate), static_cast<const float*>(up), stride,
                           rows, width);
}

}  // namespace softgrpo

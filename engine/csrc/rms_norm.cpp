#include "rms_norm.h"

#include "for_each_row.h"

#define SOFTGRPO_KERNEL "rms_norm.inc"
#include "shared/each_isa.h"

namespace softgrpo {
namespace {

template <class T>
void rms_norm_rows(T* out, T* total, const T* x, const T* residual, const T* weight, int64_t rows,
                   int64_t hidden, float eps) {
  const auto kernel = SOFTGRPO_BEST(rms_norm_row<T>);
  for_each_row(rows, hidden, [=](int64_t row) {
    const int64_t at = row * hidden;
    kernel(out + at, residual ? total + at : nullptr, x + at, residual ? residual + at : nullptr,
           weight, hidden, eps);
  });
}

template <class T>
void rms_norm_backward_rows(T* d_total, float* d_weights, const T* d_out, const T* d_sum,
                            const T* total, const T* weight, int64_t rows, int64_t hidden,
                            int64_t parts, float eps) {
  const auto kernel = SOFTGRPO_BEST(rms_norm_backward_row<T>);
  for_each_row(parts, rows / parts * hidden, [=](int64_t part) {
    float* d_weight = d_weights ? d_weights + part * hidden : nullptr;
    for (int64_t row = part * rows / parts; row < (part + 1) * rows / parts; ++row) {
      const int64_t at = row * hidden;
      kernel(d_total + at, d_weight, d_out + at, d_sum ? d_sum + at : nullptr, total + at, weight,
             hidden, eps);
    }
  });
}

template <class T>
void normalise_heads_of_rows(T* qkv, const T* q_norm, const T* k_norm, int64_t rows,
                             int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, float eps) {
  const auto kernel = SOFTGRPO_BEST(rms_norm_row<T>);
  const int64_t width = (num_heads + 2 * num_kv_heads) * head_dim;
  for_each_row(rows, width, [=](int64_t row) {
    T* head = qkv + row * width;
    for (int64_t i = 0; i < num_heads + num_kv_heads; ++i, head += head_dim)
      kernel(head, nullptr, head, nullptr, i < num_heads ? q_norm : k_norm, head_dim, eps);
  });
}

}  // namespace

void rms_norm(void* out, void* total, const void* x, const void* residual, const void* weight,
              int64_t rows, int64_t hidden, float eps, bool bf16) {
  if (bf16)
    rms_norm_rows(static_cast<Bf16*>(out), static_cast<Bf16*>(total), static_cast<const Bf16*>(x),
                  static_cast<const Bf16*>(residual), static_cast<const Bf16*>(weight), rows,
                  hidden, eps);
  else
    rms_norm_rows(static_cast<float*>(out), static_cast<float*>(total),
                  static_cast<const float*>(x), static_cast<const float*>(residual),
                  static_cast<const float*>(weight), rows, hidden, eps);
}

void rms_norm_backward(void* d_total, float* d_weights, const void* d_out, const void* d_sum,
                       const void* total, const void* weight, int64_t rows, int64_t hidden,
                       int64_t parts, float eps, bool bf16) {
  if (bf16)
    rms_norm_backward_rows(static_cast<Bf16*>(d_total), d_weights, static_cast<const Bf16*>(d_out),
                           static_cast<const Bf16*>(d_sum), static_cast<const Bf16*>(total),
                           static_cast<const Bf16*>(weight), rows, hidden, parts, eps);
  else
    rms_norm_backward_rows(static_cast<float*>(d_total), d_weights,
                           static_cast<const float*>(d_out), static_cast<const float*>(d_sum),
                           static_cast<const float*>(total), static_cast<const float*>(weight),
                           rows, hidden, parts, eps);
}

void normalise_heads(void* qkv, const void* q_norm, const void* k_norm, int64_t rows,
                     int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, float eps,
                     bool bf16) {
  if (bf16)
    normalise_heads_of_rows(static_cast<Bf16*>(qkv), static_cast<const Bf16*>(q_norm),
                            static_cast<const Bf16*>(k_norm), rows, num_heads, num_kv_heads,
                            head_dim, eps);
  else
    normalise_heads_of_rows(static_cast<float*>(qkv), static_cast<const float*>(q_norm),
                            static_cast<const float*>(k_norm), rows, num_heads, num_kv_heads,
                            head_dim, eps);
}

}  // namespace softgrpo

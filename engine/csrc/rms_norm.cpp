// rms_norm, silu_mul and rope_store_kv: one row is one task, so that nothing depends on the batch
// or on the threads.
#include <stdexcept>
#include <string>

#include "decoder.h"

#define SOFTGRPO_KERNEL "decoder_ops.inc"
#include "shared/each_isa.h"

namespace softgrpo {
namespace {

// Below this many elements starting the threads costs more than it saves.
constexpr int64_t kParallelElements = 1 << 15;

template <class Row>
void for_each_row(int64_t rows, int64_t elements_per_row, const Row& row) {
#pragma omp parallel for schedule(static) if (rows * elements_per_row > kParallelElements)
  for (int64_t i = 0; i < rows; ++i) row(i);
}

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

template <class T>
void silu_mul_rows(T* out, const T* gate_up, int64_t rows, int64_t width) {
  const auto kernel = SOFTGRPO_BEST(silu_mul_row<T>);
  for_each_row(rows, width, [=](int64_t row) {
    const T* gate = gate_up + row * 2 * width;
    kernel(out + row * width, gate, gate + width, width);
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

void silu_mul(void* out, const void* gate_up, int64_t rows, int64_t width, bool bf16) {
  if (bf16)
    silu_mul_rows(static_cast<Bf16*>(out), static_cast<const Bf16*>(gate_up), rows, width);
  else
    silu_mul_rows(static_cast<float*>(out), static_cast<const float*>(gate_up), rows, width);
}

void rope_store_kv(const RopeStore& args, bool bf16) {
  if (args.head_dim > kMaxHeadDim)
    throw std::invalid_argument("head_dim " + std::to_string(args.head_dim) + ": at most " +
                                std::to_string(kMaxHeadDim));
  const int64_t slots = args.num_pages * args.page_size;
  for (int64_t row = 0; row < args.rows; ++row)
    if (args.slots[row] < 0 || args.slots[row] >= slots)
      throw std::invalid_argument("slot_mapping[" + std::to_string(row) + "] = " +
                                  std::to_string(args.slots[row]) + ": the cache has " +
                                  std::to_string(slots) + " slots");
  const auto kernel = bf16 ? SOFTGRPO_BEST(rope_store_row<Bf16>) : SOFTGRPO_BEST(rope_store_row<float>);
  const int64_t elements = (args.num_heads + 2 * args.num_kv_heads) * args.head_dim;
  for_each_row(args.rows, elements, [&](int64_t row) { kernel(args, row); });
}

}  // namespace softgrpo

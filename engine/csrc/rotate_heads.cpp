#include "rotate_heads.h"

#include <stdexcept>
#include <string>

#include "for_each_row.h"

#define SOFTGRPO_KERNEL "rotate_heads.inc"
#include "shared/each_isa.h"

namespace softgrpo {
namespace {

void check(const RotateHeads& a) {
  if (a.head_dim > kMaxHeadDim)
    throw std::invalid_argument("head_dim " + std::to_string(a.head_dim) + ": at most " +
                                std::to_string(kMaxHeadDim));
  const auto refuse = [&](const std::string& what) {
    throw std::invalid_argument(what + ": there are " + std::to_string(a.count) + " places");
  };
  for (int64_t row = 0; row <= a.rows; ++row)
    if (a.copy_starts[row] < (row ? a.copy_starts[row - 1] : 0) || a.copy_starts[row] > a.count)
      refuse("copy_starts[" + std::to_string(row) + "] = " + std::to_string(a.copy_starts[row]));
  for (int64_t i = 0; i < a.count; ++i)
    if (a.copies[i] < 0 || a.copies[i] >= a.count)
      refuse("copies[" + std::to_string(i) + "] = " + std::to_string(a.copies[i]));
}

template <class Row>
void each_row(const RotateHeads& a, const Row& kernel) {
  check(a);
  for_each_row(a.rows, (a.num_heads + 2 * a.num_kv_heads) * a.head_dim,
               [&](int64_t row) { kernel(a, row); });
}

}  // namespace

void rotate_heads(const RotateHeads& a, bool bf16) {
  each_row(a, bf16 ? SOFTGRPO_BEST(rotate_heads_row<Bf16>) : SOFTGRPO_BEST(rotate_heads_row<float>));
}

void rotate_heads_backward(const RotateHeads& a, bool bf16) {
  each_row(a, bf16 ? SOFTGRPO_BEST(rotate_heads_backward_row<Bf16>)
                   : SOFTGRPO_BEST(rotate_heads_backward_row<float>));
}

}  // namespace softgrpo

#include "rope_store_kv.h"

#include <stdexcept>
#include <string>

#include "for_each_row.h"

#define SOFTGRPO_KERNEL "rope_store_kv.inc"
#include "shared/each_isa.h"

namespace softgrpo {

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

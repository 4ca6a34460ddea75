#include "indexed_dot.h"

#include <utility>
#include <vector>

#include "shared/half.h"

#define SOFTGRPO_KERNEL "indexed_dot.inc"
#include "shared/each_isa.h"

namespace softgrpo {
namespace {

constexpr int64_t kSerialElements = 1 << 15;  // less work than this is not worth a second thread
constexpr int kDigitBits = 11;

uint32_t id_of(uint64_t key) { return static_cast<uint32_t>(key >> 32); }

}  // namespace

void indexed_dot(const IndexedDot& args) {
  const auto kernel = args.table.dtype == kFloat32    ? SOFTGRPO_BEST(dot_slots<float>)
                      : args.table.dtype == kBfloat16 ? SOFTGRPO_BEST(dot_slots<Bf16>)
                                                      : SOFTGRPO_BEST(dot_slots<Half>);
  const bool parallel = args.rows * args.slots * args.table.width > kSerialElements;
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t row = 0; row < args.rows; ++row) kernel(args, row);
}

// Radix sort by the id, least significant digit first. It is stable, so that the positions of one id
// stay in ascending order; its work does not depend on the vocabulary, only on the largest id's bits.
int64_t sort_ids(uint64_t* keys, uint64_t* spare, const int32_t* ids, int64_t count) {
  int64_t pairs = 0;
  uint32_t largest = 0;
  for (int64_t at = 0; at < count; ++at) {
    if (ids[at] < 0) continue;
    const auto id = static_cast<uint32_t>(ids[at]);
    largest = id > largest ? id : largest;
    keys[pairs++] = static_cast<uint64_t>(id) << 32 | static_cast<uint64_t>(at);
  }
  uint64_t *from = keys, *to = spare;
  for (int shift = 32; shift - 32 < 31 && largest >> (shift - 32); shift += kDigitBits) {
    constexpr uint64_t kDigits = uint64_t{1} << kDigitBits;
    std::vector<int64_t> start(kDigits + 1);
    for (int64_t i = 0; i < pairs; ++i) ++start[(from[i] >> shift & (kDigits - 1)) + 1];
    for (uint64_t digit = 0; digit < kDigits; ++digit) start[digit + 1] += start[digit];
    for (int64_t i = 0; i < pairs; ++i) to[start[from[i] >> shift & (kDigits - 1)]++] = from[i];
    std::swap(from, to);
  }
  if (from != keys) std::memcpy(keys, from, pairs * sizeof *keys);
  return pairs;
}

void segment_sums(const SegmentSums& args) {
  std::vector<int64_t> start;
  for (int64_t i = 0; i < args.pairs; ++i)
    if (i == 0 || id_of(args.keys[i]) != id_of(args.keys[i - 1])) start.push_back(i);
  const int64_t segments = static_cast<int64_t>(start.size());
  start.push_back(args.pairs);
  const auto kernel = args.hidden_dtype == kFloat32    ? SOFTGRPO_BEST(sum_segment<float>)
                      : args.hidden_dtype == kBfloat16 ? SOFTGRPO_BEST(sum_segment<Bf16>)
                                                       : SOFTGRPO_BEST(sum_segment<Half>);
  const int64_t element = args.out_dtype == kFloat32 ? 4 : 2;
  const bool compact = args.row_ids != nullptr, parallel = args.pairs * args.width > kSerialElements;
  // Blocks of columns too: one id may own most pairs.
  constexpr int64_t kColumns = 1024;
  const int64_t blocks = (args.width + kColumns - 1) / kColumns;
#pragma omp parallel for collapse(2) schedule(dynamic, 16) if (parallel)
  for (int64_t segment = 0; segment < segments; ++segment)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = block * kColumns;
      const int64_t end = begin + kColumns < args.width ? begin + kColumns : args.width;
      const int64_t first = start[segment], id = id_of(args.keys[first]);
      if (compact) args.row_ids[segment] = id;
      void* out = static_cast<char*>(args.out) + (compact ? segment : id) * args.out_stride * element;
      kernel(args, args.keys + first, start[segment + 1] - first, out, !compact, begin, end);
    }
}

}  // namespace softgrpo

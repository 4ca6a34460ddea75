#include "group_attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#define SOFTGRPO_KERNEL "group_attention.inc"
#include "shared/each_isa.h"

namespace softgrpo {
namespace {

void check(const GroupAttention& a) {
  const auto refuse = [](int64_t span) {
    throw std::invalid_argument("spans[" + std::to_string(span) + "] lies outside of the tokens");
  };
  for (int64_t i = 0; i < a.num_spans; ++i) {
    const Span& s = a.spans[i];
    if (s.start < 0 || s.length < 0 || s.prompt < 0 || s.prompt_length < 0 ||
        s.start + s.length > a.tokens || s.prompt + s.prompt_length > a.tokens)
      refuse(i);
  }
  for (int64_t g = 0; g < a.num_groups; ++g) {
    if (a.groups[g] < 0 || a.groups[g] >= a.groups[g + 1] || a.groups[g + 1] > a.num_spans)
      throw std::invalid_argument("groups[" + std::to_string(g) + "] has no spans");
    // Their gradients lie in one buffer, the prompt's first.
    for (int64_t i = a.groups[g]; i < a.groups[g + 1]; ++i)
      if (a.spans[i].prompt_length != (i > a.groups[g]) * a.spans[a.groups[g]].length) refuse(i);
  }
}

// Memory of a thread, zero: the padding stays so.
class Buffers : public AttentionBuffers {
 public:
  Buffers(const GroupAttention& a, int64_t keys, bool backward) {
    dim = padded(a.head_dim), columns = padded(keys);
    const int64_t rows = std::max(kQueryRows, a.heads_of_kv());
    const int64_t matrix = columns * dim, block = rows * dim;
    const int64_t scores = rows * (backward ? kKeyBlock : columns);
    memory_.resize((backward ? 6 : 3) * matrix + 3 * block + (backward ? 2 : 1) * scores + rows);
    float* next = memory_.data();
    const auto take = [&](int64_t size, bool wanted = true) {
      float* const taken = next;
      next += wanted ? size : 0;
      return taken;
    };
    k_turned = take(matrix), k = take(matrix), v = take(matrix);
    v_turned = take(matrix, backward), d_k = take(matrix, backward), d_v = take(matrix, backward);
    q = take(block), d_out = take(block), out = take(block);
    weights = take(scores), d_scores = take(scores, backward);
    totals = take(rows);
  }

 private:
  std::vector<float> memory_;
};

// kernel(args, buffers, unit, KV head) for every unit: a span, or a group.
template <class Kernel>
void each(const GroupAttention& a, int64_t units, bool backward, const Kernel& kernel) {
  check(a);
  int64_t keys = 0;
  for (int64_t i = 0; i < a.num_spans; ++i) keys = std::max(keys, a.spans[i].keys());
  const int64_t tasks = units * a.num_kv_heads;
#pragma omp parallel if (tasks > 1)
  {
    Buffers buffers(a, keys, backward);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task)
      kernel(a, buffers, task / a.num_kv_heads, task % a.num_kv_heads);
  }
}

}  // namespace

void group_attention(const GroupAttention& a, bool bf16) {
  each(a, a.num_spans, false,
       bf16 ? SOFTGRPO_BEST(attend_span<Bf16>) : SOFTGRPO_BEST(attend_span<float>));
}

void group_attention_backward(const GroupAttention& a, bool bf16) {
  each(a, a.num_groups, true,
       bf16 ? SOFTGRPO_BEST(attend_group_backward<Bf16>)
            : SOFTGRPO_BEST(attend_group_backward<float>));
}

}  // namespace softgrpo

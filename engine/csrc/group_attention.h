// Causal attention over packed groups, with gradients; described in
// softgrpo_engine/ops/cpu/group_attention.py. Bad indices throw std::invalid_argument.
#pragma once
#include <cstdint>

namespace softgrpo {

// Consecutive queries, which see themselves up to the query, and their prompt before: rows of the
// packed tokens. The span of a prompt has none.
struct Span {
  int64_t start, length, prompt, prompt_length;
  int64_t keys() const { return prompt_length + length; }
};

// q, out [T, Hq, D]; k, v [T, Hkv, D]; lse [T, Hq]. groups [count + 1]: the spans of group g are
// groups[g] .. groups[g + 1], its prompt's the first. The gradients are null in the forward pass,
// where out and lse are written.
struct GroupAttention {
  void* out;
  float* lse;
  const void* q;
  const void* k;
  const void* v;
  const void* d_out;
  void* d_q;
  void* d_k;
  void* d_v;
  const Span* spans;
  const int64_t* groups;
  int64_t tokens, num_spans, num_groups, num_heads, num_kv_heads, head_dim;
  float scale;
  int64_t heads_of_kv() const { return num_heads / num_kv_heads; }
};

void group_attention(const GroupAttention& args, bool bf16);
void group_attention_backward(const GroupAttention& args, bool bf16);

// What the kernels and their driver share.

// Query rows (queries x heads of a KV head) at a time; keys that stay in the cache meanwhile.
constexpr int64_t kQueryRows = 48;
constexpr int64_t kKeyBlock = 256;
// Two registers of the widest instruction set: buffers are padded to it.
constexpr int64_t kPad = 32;
constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// Buffers of one thread, for spans of at most `keys` keys.
struct AttentionBuffers {
  int64_t dim, columns;        // padded: of a head, of the keys
  float *k_turned, *v_turned;  // [D, keys]
  float *k, *v, *d_k, *d_v;    // [keys, D]
  float *q, *d_out, *out;      // [rows, D]; out becomes d_q
  float *weights, *d_scores;   // [rows, keys]; backward [rows, kKeyBlock]
  float* totals;               // [rows]: of the weights; backward d_out . out
};

}  // namespace softgrpo

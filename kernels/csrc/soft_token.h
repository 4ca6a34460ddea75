// The soft step of a decode; arguments are described in softgrpo_kernels/soft_token.py.
#pragma once
#include <cstdint>

#include "soft_embedding.h"

namespace softgrpo {

constexpr int64_t kMaxCandidates = 64;

// The parameters of a row, a column of a table for each: RowValues of softgrpo_kernels/row_rules.py
// in its order. A test holds the two lists together.
#define SOFTGRPO_FLOAT_COLUMNS(COLUMN)                                       \
  COLUMN(temperature) COLUMN(top_p) COLUMN(min_p) COLUMN(tau) COLUMN(reach)  \
  COLUMN(noise_scale) COLUMN(clamp_low) COLUMN(clamp_high) COLUMN(eps)
#define SOFTGRPO_INT_COLUMNS(COLUMN)                                         \
  COLUMN(top_k) COLUMN(seed) COLUMN(position) COLUMN(uid) COLUMN(stream)     \
  COLUMN(mode) COLUMN(noise)

#define SOFTGRPO_COUNT(name) +1
constexpr int64_t kFloatColumns = 0 SOFTGRPO_FLOAT_COLUMNS(SOFTGRPO_COUNT);
constexpr int64_t kIntColumns = 0 SOFTGRPO_INT_COLUMNS(SOFTGRPO_COUNT);
#undef SOFTGRPO_COUNT

struct SoftTokenArgs {
  const void* logits;  // [rows, vocabulary]
  Dtype logits_dtype;
  int64_t rows, vocabulary, logits_stride;
  int64_t k_max;

  const float* floats;  // [kFloatColumns, rows]
  const int64_t* ints;  // [kIntColumns, rows]
  bool joint;           // top-p is a share of the whole vocabulary

  const int32_t* terminal_ids;  // [rows, terminal_width] or null
  int64_t terminal_width;

  const void* hidden;  // [rows, hidden_width] or null; of lm_head's dtype
  int64_t hidden_stride;
  EmbeddingTable lm_head;
  const float* bias;  // [vocabulary] or null
  float softcap;      // 0: none
  float logit_scale;
  EmbeddingTable embed;

  int32_t* ids;       // [rows, k_max], as are the next three
  float* gprime;
  float* weights;
  float* logp;
  int32_t* n;         // [rows], as are the rest but embed_out [rows, embed.width]
  int32_t* token;
  float* token_logp;
  uint8_t* kind;
  bool* valid;
  void* embed_out;    // null: not wanted, as are the next three
  float* lse;
  float* entropy;
  float* kept_mass;
};
void soft_token(const SoftTokenArgs& args);

}  // namespace softgrpo

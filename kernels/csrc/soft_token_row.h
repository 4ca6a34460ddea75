// What one row of soft_token works with.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "noise.h"
#include "soft_token.h"

namespace softgrpo {

constexpr int64_t kTile = 256;

// The last bucket of a nucleus takes everything 32 or more below the best logit.
constexpr int64_t kBucketsPerUnit = 64;
constexpr int64_t kBuckets = 32 * kBucketsPerUnit;

// A token (or tile) and its logit, perturbed or not.
struct Candidate {
  float value;
  int32_t id;
};

// The order of candidates: value descending, id ascending.
inline bool comes_before(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id);
}

// The probability of c in units of that of `first`; values are logits over the temperature.
inline double ratio(const Candidate& c, const Candidate& first) {
  return std::exp(static_cast<double>(c.value) - first.value);
}

struct Sums {
  double mass, weighted;
};

enum Mode { kGreedy = 0, kDiscrete = 1, kSoft = 2, kSkip = 3 };

// The parameters of a row by their names.
struct Row {
#define COLUMN(name) float name;
  SOFTGRPO_FLOAT_COLUMNS(COLUMN)
#undef COLUMN
#define COLUMN(name) int64_t name;
  SOFTGRPO_INT_COLUMNS(COLUMN)
#undef COLUMN

  NoiseKey key() const {
    return {seed, static_cast<uint32_t>(position), static_cast<uint32_t>(uid),
            static_cast<uint32_t>(stream)};
  }
};

inline Row row_parameters(const SoftTokenArgs& a, int64_t b) {
  Row row;
  int64_t column = 0;
#define COLUMN(name) row.name = a.floats[column++ * a.rows + b];
  SOFTGRPO_FLOAT_COLUMNS(COLUMN)
#undef COLUMN
  column = 0;
#define COLUMN(name) row.name = a.ints[column++ * a.rows + b];
  SOFTGRPO_INT_COLUMNS(COLUMN)
#undef COLUMN
  return row;
}

// Buffers of a thread.
struct Scratch {
  std::vector<Candidate> tiles, chosen_tiles, list, border;
  std::vector<uint16_t> bucket_of;
  std::vector<double> masses;
  std::vector<int32_t> ids;
  std::vector<float> noise, values;
};

// What a slot holds.
struct Slot {
  Candidate perturbed;  // g' and id
  float logp;
};

}  // namespace softgrpo

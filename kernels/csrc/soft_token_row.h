// What one row of soft_token works with.
#pragma once
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

struct Sums {
  double mass, weighted;
};

enum Mode { kGreedy = 0, kDiscrete = 1, kSoft = 2, kSkip = 3 };

struct Row {
  float temperature, top_p, min_p, tau, noise_scale, clamp_low, clamp_high, eps;
  int64_t top_k, mode, noise;
  NoiseKey key;
};

inline Row row_parameters(const SoftTokenArgs& a, int64_t b) {
  const auto f = [&](int64_t i) { return a.floats[i * a.rows + b]; };
  const auto i = [&](int64_t j) { return a.ints[j * a.rows + b]; };
  const NoiseKey key = {i(1), static_cast<uint32_t>(i(2)), static_cast<uint32_t>(i(3)),
                        static_cast<uint32_t>(i(4))};
  return {f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), i(0), i(5), i(6), key};
}

// Buffers of a thread.
struct Scratch {
  std::vector<Candidate> tiles, chosen_tiles, list, border;
  std::vector<uint16_t> bucket_of;
  std::vector<double> masses;
  std::vector<int32_t> ids;
  std::vector<float> noise;
};

// What a slot holds.
struct Slot {
  Candidate perturbed;  // g' and id
  float logp;
};

}  // namespace softgrpo

#include "soft_token_perturb.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#define SOFTGRPO_KERNEL "soft_token_perturb.inc"
#include "shared/each_isa.h"

namespace softgrpo {
namespace {

enum Noise : int64_t {
  kGumbel = 0, kNone = 1, kDirichlet = 2, kGaussian = 3,
  // From here on the token is drawn itself.
  kMultiplex = 4, kMultiplexWeighted = 5, kMixtureOfInputs = 6, kMean = 7,
};

constexpr float kMinShape = 1e-30f;
constexpr double kMinWeight = 1e-6;
constexpr float kMinLogWeight = 0x1p-20f;
constexpr int32_t kCountSize = 64;

struct SlotIds {
  int32_t ids[kMaxCandidates];
  SlotIds(const Slot* slots, int64_t count) {
    for (int64_t j = 0; j < count; ++j) ids[j] = slots[j].perturbed.id;
  }
};

double probability(const Slot& slot) { return std::exp(static_cast<double>(slot.logp)); }

void gumbel_slots(Slot* slots, int64_t count, const Row& row) {
  const SlotIds tokens(slots, count);
  float noise[kMaxCandidates];
  SOFTGRPO_BEST(gumbel_of_ids)(noise, tokens.ids, count, row.key());
  for (int64_t j = 0; j < count; ++j) {
    if (row.mode == kSoft)
      noise[j] = row.noise_scale * std::min(std::max(noise[j], row.clamp_low), row.clamp_high);
    slots[j].perturbed.value = slots[j].logp + noise[j];
  }
}

void dirichlet_slots(Slot* slots, int64_t count, const Row& row) {
  const SlotIds tokens(slots, count);
  float shapes[kMaxCandidates], log_gammas[kMaxCandidates];
  for (int64_t j = 0; j < count; ++j)
    shapes[j] = std::max(row.noise_scale * static_cast<float>(probability(slots[j])), kMinShape);
  SOFTGRPO_BEST(log_gamma_of_ids)(log_gammas, tokens.ids, shapes, count, row.key());
  const double top = *std::max_element(log_gammas, log_gammas + count);
  double mass = 0.0;
  for (int64_t j = 0; j < count; ++j) mass += std::exp(log_gammas[j] - top);
  const double log_sum = top + std::log(mass);
  for (int64_t j = 0; j < count; ++j)
    slots[j].perturbed.value = static_cast<float>(log_gammas[j] - log_sum);
}

void gaussian_slots(Slot* slots, int64_t count, const Row& row) {
  const SlotIds tokens(slots, count);
  float noise[kMaxCandidates];
  SOFTGRPO_BEST(normal_of_ids)(noise, tokens.ids, count, row.key());
  for (int64_t j = 0; j < count; ++j) {
    const double noisy = probability(slots[j]) + row.noise_scale * noise[j];
    slots[j].perturbed.value = static_cast<float>(std::log(std::max(noisy, kMinWeight)));
  }
}

// The slot that wins a draw from p; draw 0 is that of a discrete row.
int64_t drawn_slot(const Slot* slots, int64_t count, const SlotIds& tokens, const Row& row,
                   int64_t draw) {
  NoiseKey key = row.key();
  key.stream += static_cast<uint32_t>(draw) << 16;
  float noise[kMaxCandidates];
  SOFTGRPO_BEST(gumbel_of_ids)(noise, tokens.ids, count, key);
  const auto perturbed = [&](int64_t j) {
    return Candidate{slots[j].logp + noise[j], tokens.ids[j]};
  };
  int64_t best = 0;
  for (int64_t j = 1; j < count; ++j)
    if (comes_before(perturbed(j), perturbed(best))) best = j;
  return best;
}

// log(count p), count - 1 in its low bits: the nearest word that ends in them.
float with_count(float value, int32_t count) {
  if (std::fabs(value) < kMinLogWeight) value = kMinLogWeight;
  int32_t word;
  std::memcpy(&word, &value, sizeof word);
  word = ((word - (count - 1) + kCountSize / 2) & -kCountSize) | (count - 1);
  std::memcpy(&value, &word, sizeof word);
  return value;
}

void multiplex_slots(Slot* slots, int64_t count, const SlotIds& tokens, const Row& row,
                     int64_t first) {
  int32_t drawn[kMaxCandidates] = {};
  ++drawn[first];
  for (int64_t draw = 1; draw < static_cast<int64_t>(row.noise_scale); ++draw)
    ++drawn[drawn_slot(slots, count, tokens, row, draw)];
  const bool weighted = row.noise == kMultiplexWeighted;
  float logs[kMaxCandidates];
  for (int64_t j = 0; j < count; ++j)
    logs[j] = static_cast<float>(std::max(drawn[j], 1)) / (weighted ? 1.0f : row.noise_scale);
  SOFTGRPO_BEST(logs_in_place)(logs, count);
  for (int64_t j = 0; j < count; ++j)
    slots[j].perturbed.value = drawn[j] == 0 ? -HUGE_VALF
                               : weighted    ? with_count(slots[j].logp + logs[j], drawn[j])
                                             : logs[j];
}

// The slots come with the most probable first: its p is what the sum of all leaves for it.
void mixture_slots(Slot* slots, int64_t count, const Row& row, int64_t first) {
  const auto below = [&](int64_t j) { return static_cast<double>(slots[0].logp - slots[j].logp); };
  double others = 0.0, weighted = 0.0;
  for (int64_t j = 1; j < count; ++j) {
    const double ratio = std::exp(-below(j));
    others += ratio;
    weighted += ratio * below(j);
  }
  const double log_sum = std::log(1.0 + others);
  const double entropy = log_sum + weighted / (1.0 + others);
  const double most = std::log(static_cast<double>(std::max<int64_t>(count, 2)));
  const double uncertainty = std::min(entropy / most, 1.0);
  const double share = uncertainty / (1.0 + row.noise_scale);
  for (int64_t j = 0; j < count; ++j) {
    const double log_p = -below(j) - log_sum;
    const double log_weight =
        j == first ? std::log(share * (std::exp(log_p) + row.noise_scale) + (1.0 - uncertainty))
                   : std::log(share) + log_p;
    slots[j].perturbed.value = static_cast<float>(log_weight);
  }
}

// g' of methods that draw the token; returns its slot.
int64_t slots_of_drawn(Slot* slots, int64_t count, const Row& row) {
  const SlotIds tokens(slots, count);
  const int64_t first = drawn_slot(slots, count, tokens, row, 0);
  if (row.noise == kMixtureOfInputs)
    mixture_slots(slots, count, row, first);
  else if (row.noise == kMean)
    for (int64_t j = 0; j < count; ++j) slots[j].perturbed.value = slots[j].logp;
  else
    multiplex_slots(slots, count, tokens, row, first);
  return first;
}

}  // namespace

void perturb(Slot* slots, int64_t count, const Row& row) {
  const int64_t kind = row.mode == kSoft ? row.noise : int64_t{kGumbel};
  int64_t sorted = 0;  // where the order of g' begins
  if (kind == kGumbel) gumbel_slots(slots, count, row);
  if (kind == kNone)
    for (int64_t j = 0; j < count; ++j) slots[j].perturbed.value = slots[j].logp;
  if (kind == kDirichlet) dirichlet_slots(slots, count, row);
  if (kind == kGaussian) gaussian_slots(slots, count, row);
  if (kind >= kMultiplex) {
    std::swap(slots[0], slots[slots_of_drawn(slots, count, row)]);
    sorted = 1;
  }
  std::sort(slots + sorted, slots + count,
            [](const Slot& a, const Slot& b) { return comes_before(a.perturbed, b.perturbed); });
}

}  // namespace softgrpo

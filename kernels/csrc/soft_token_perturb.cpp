#include "soft_token_perturb.h"

#include <algorithm>
#include <cmath>

#define SOFTGRPO_KERNEL "soft_token_perturb.inc"
#include "shared/each_isa.h"

namespace softgrpo {
namespace {

enum Noise : int64_t { kGumbel = 0, kNone = 1, kDirichlet = 2, kGaussian = 3, kMultiplex = 4 };

constexpr float kMinShape = 1e-30f;
constexpr double kMinWeight = 1e-6;

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

// The slots that were drawn move to the front; returns their number.
int64_t multiplex_slots(Slot* slots, int64_t count, const Row& row) {
  const SlotIds tokens(slots, count);
  float noise[kMaxCandidates];
  int64_t drawn[kMaxCandidates] = {};
  const auto draws = static_cast<int64_t>(row.noise_scale);
  for (int64_t draw = 0; draw < draws; ++draw) {
    NoiseKey key = row.key();
    key.stream += static_cast<uint32_t>(draw) << 16;
    SOFTGRPO_BEST(gumbel_of_ids)(noise, tokens.ids, count, key);
    int64_t best = 0;
    for (int64_t j = 0; j < count; ++j) {
      slots[j].perturbed.value = slots[j].logp + noise[j];
      if (comes_before(slots[j].perturbed, slots[best].perturbed)) best = j;
    }
    ++drawn[best];
  }
  int64_t used = 0;
  for (int64_t j = 0; j < count; ++j) {
    if (drawn[j] == 0) continue;
    slots[used] = slots[j];
    slots[used++].perturbed.value =
        static_cast<float>(std::log(static_cast<double>(drawn[j]) / static_cast<double>(draws)));
  }
  return used;
}

}  // namespace

int64_t perturb(Slot* slots, int64_t count, const Row& row) {
  const int64_t kind = row.mode == kSoft ? row.noise : int64_t{kGumbel};
  if (kind == kGumbel) gumbel_slots(slots, count, row);
  if (kind == kNone)
    for (int64_t j = 0; j < count; ++j) slots[j].perturbed.value = slots[j].logp;
  if (kind == kDirichlet) dirichlet_slots(slots, count, row);
  if (kind == kGaussian) gaussian_slots(slots, count, row);
  if (kind == kMultiplex) count = multiplex_slots(slots, count, row);
  std::sort(slots, slots + count,
            [](const Slot& a, const Slot& b) { return comes_before(a.perturbed, b.perturbed); });
  return count;
}

}  // namespace softgrpo

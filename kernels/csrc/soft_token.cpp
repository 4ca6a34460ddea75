// One row is one task: nothing depends on the batch, on its order or on the threads. The passes over
// the vocabulary are vector code (soft_token.inc); what follows on the few candidates is done in
// fp64, so that no boundary and no rounded result depends on a library's exp or an order of sums.
#include "soft_token.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <numeric>

#include "shared/half.h"
#include "soft_token_perturb.h"
#include "soft_token_row.h"

#define SOFTGRPO_KERNEL "soft_token.inc"
#include "shared/each_isa.h"

namespace softgrpo {
namespace {

template <class T>
class RowSampler {
 public:
  RowSampler(const SoftTokenArgs& args, int64_t b, Scratch& scratch)
      : args_(args), b_(b), row_(row_parameters(args, b)), scratch_(scratch),
        z_(static_cast<const T*>(args.logits) + b * args.logits_stride) {}

  void run() {
    write_padding();
    if (row_.mode == kSkip) return;
    scratch_.tiles.resize((args_.vocabulary + kTile - 1) / kTile);
    const bool good = SOFTGRPO_BEST(tile_maxima<T>)(scratch_.tiles.data(), z_, args_.vocabulary);
    best_tile_ = *std::min_element(scratch_.tiles.begin(), scratch_.tiles.end(), comes_before);
    const float best = row_.mode == kGreedy ? best_tile_.value : top();
    if (!good || std::fabs(best) == HUGE_VALF) {
      args_.valid[b_] = false;
      return;
    }
    const bool listed = row_.top_k >= 1 && row_.top_k <= args_.k_max;
    if (row_.mode == kGreedy)
      sample_greedy();
    else if (listed)
      sample_listed();
    else
      sample_unlisted();
    write_row();
  }

 private:
  bool soft() const { return row_.mode == kSoft; }

  float top() const { return best_tile_.value / row_.temperature; }

  Sums sums(float temperature) const {
    return SOFTGRPO_BEST(exponential_sums<T>)(z_, args_.vocabulary, temperature,
                                              best_tile_.value / temperature);
  }

  void write_padding() {
    const int64_t at = b_ * args_.k_max;
    std::fill_n(args_.ids + at, args_.k_max, -1);
    std::fill_n(args_.gprime + at, args_.k_max, -HUGE_VALF);
    std::fill_n(args_.weights + at, args_.k_max, 0.0f);
    std::fill_n(args_.logp + at, args_.k_max, -HUGE_VALF);
    args_.n[b_] = 0;
    args_.token[b_] = -1;
    args_.token_logp[b_] = -HUGE_VALF;
    args_.kind[b_] = 0;
    args_.valid[b_] = true;
    if (args_.embed_out) write_embedding();
    if (args_.lse) args_.lse[b_] = std::numeric_limits<float>::quiet_NaN();
    if (args_.entropy) args_.entropy[b_] = std::numeric_limits<float>::quiet_NaN();
    if (args_.kept_mass) args_.kept_mass[b_] = std::numeric_limits<float>::quiet_NaN();
  }

  // Appends the tokens of one tile with logits of at least `low` (and above -inf) to the list.
  void append_tile(int64_t tile, float low) {
    const int64_t begin = tile * kTile;
    const int64_t end = std::min(begin + kTile, args_.vocabulary);
    Candidate found[kTile];
    const int64_t count = SOFTGRPO_BEST(find_at_least<T>)(found, z_, begin, end, low);
    scratch_.list.insert(scratch_.list.end(), found, found + count);
  }

  // The first k tokens of the row, unsorted, values not yet divided by the temperature.
  // A token among the first k lies in one of the first k tiles, ordered by (maximum, position):
  // fewer than k tiles have a token before it. So the k tiles hold them all, ties included.
  void select_candidates(int64_t k) {
    auto& tiles = scratch_.chosen_tiles;
    tiles = scratch_.tiles;
    float low = -HUGE_VALF;
    if (static_cast<int64_t>(tiles.size()) > k) {
      std::nth_element(tiles.begin(), tiles.begin() + (k - 1), tiles.end(), comes_before);
      tiles.resize(k);
      low = tiles.back().value;
    }
    auto& list = scratch_.list;
    list.clear();
    for (const Candidate& tile : tiles)
      if (tile.value > -HUGE_VALF) append_tile(tile.id, low);
    if (static_cast<int64_t>(list.size()) > k) {
      std::nth_element(list.begin(), list.begin() + (k - 1), list.end(), comes_before);
      list.resize(k);
    }
  }

  // Logits of the candidates again, as fp32 dot products.
  void refine_candidates() {
    const EmbeddingTable& head = args_.lm_head;
    const auto kernel = head.dtype == kFloat32    ? SOFTGRPO_BEST(dot<float>)
                        : head.dtype == kBfloat16 ? SOFTGRPO_BEST(dot<Bf16>)
                                                  : SOFTGRPO_BEST(dot<Half>);
    const int64_t bytes = head.dtype == kFloat32 ? 4 : 2;
    const char* x = static_cast<const char*>(args_.hidden) + b_ * args_.hidden_stride * bytes;
    const char* table = static_cast<const char*>(head.weights);
    for (Candidate& c : scratch_.list) {
      float z = kernel(x, table + c.id * head.stride * bytes, head.width);
      if (args_.bias) z += args_.bias[c.id];
      z *= args_.logit_scale;
      c.value = args_.softcap > 0.0f ? std::tanh(z / args_.softcap) * args_.softcap : z;
    }
  }

  // Steps 1 to 5 on the row's candidates.
  void sample_listed() {
    select_candidates(row_.top_k);
    auto& list = scratch_.list;
    if (args_.hidden) {
      const double before = logit_mass();
      refine_candidates();
      refined_mass_ = logit_mass() - before;
    }
    for (Candidate& c : list) c.value /= row_.temperature;
    std::sort(list.begin(), list.end(), comes_before);
    const auto count = static_cast<int64_t>(list.size());
    cut(mass_of_list());
    const double eps = soft() ? row_.eps : 0.0f;
    slots_ = eps > 0.0 ? count : kept_;
    Slot slots[kMaxCandidates];
    for (int64_t j = 0; j < slots_; ++j) {
      double logp = list[j].value - kept_lse_;
      if (eps > 0.0) logp = std::log((j < kept_ ? std::exp(logp) : 0.0) + eps);
      slots[j] = {{0.0f, list[j].id}, static_cast<float>(logp)};
    }
    perturb(slots, slots_, row_);
    for (int64_t j = 0; j < slots_; ++j) write_slot(j, slots[j]);
  }

  // Mass of the listed tokens, whose values are logits, in units of the row's best token.
  double logit_mass() const {
    double mass = 0.0;
    for (const Candidate& c : scratch_.list)
      mass += std::exp(static_cast<double>(c.value / row_.temperature) - top());
    return mass;
  }

  // What top-p is a share of, in units of the first candidate's probability.
  double mass_of_list() const {
    if (args_.joint) return sums(row_.temperature).mass;
    double mass = 0.0;
    for (const Candidate& c : scratch_.list) mass += ratio(c, scratch_.list[0]);
    return mass;
  }

  // Top-p and min-p on the sorted list, `total` being the mass of the set in units of the first
  // candidate's probability. Sets kept_ and kept_lse_.
  void cut(double total) {
    const auto& list = scratch_.list;
    const auto count = static_cast<int64_t>(list.size());
    double mass = 0.0;
    for (kept_ = 0; kept_ < count; ++kept_) {
      const double r = ratio(list[kept_], list[0]);
      const bool inside = (row_.top_p >= 1.0f || mass / total < row_.top_p) && r >= row_.min_p;
      if (kept_ > 0 && !inside) break;
      mass += r;
    }
    kept_lse_ = list[0].value + std::log(mass);
  }

  // Gumbel-max over the whole vocabulary, or over a set of it that need not fit into the slots.
  void sample_unlisted() {
    const bool whole_vocabulary = row_.top_k <= 0 || row_.top_k >= args_.vocabulary;
    Candidate winner;
    if (whole_vocabulary && row_.top_p >= 1.0f && row_.min_p <= 0.0f) {
      kept_lse_ = top() + std::log(sums(row_.temperature).mass);
      winner = SOFTGRPO_BEST(gumbel_argmax<T>)(z_, args_.vocabulary, row_.temperature, row_.key(),
                                               scratch_.tiles.data(), best_tile_.id);
    } else {
      whole_vocabulary ? cut_vocabulary() : cut_top_k();
      winner = argmax_of_kept();
    }
    float noise;
    SOFTGRPO_BEST(gumbel_of_ids)(&noise, &winner.id, 1, row_.key());
    float z;
    SOFTGRPO_BEST(convert_logits<T>)(&z, z_ + winner.id, 1);
    const auto logp = static_cast<float>(z / row_.temperature - kept_lse_);
    slots_ = 1;
    write_slot(0, {{logp + noise, winner.id}, logp});
  }

  // The list gets the kept tokens of the first top_k.
  void cut_top_k() {
    select_candidates(row_.top_k);
    auto& list = scratch_.list;
    for (Candidate& c : list) c.value /= row_.temperature;
    std::sort(list.begin(), list.end(), comes_before);
    cut(mass_of_list());
  }

  // The list gets the kept tokens of the whole vocabulary, unsorted.
  // Only the bucket in which the mass reaches top_p has to be sorted, and only tokens within some
  // reach of the best are put into buckets: most often few hold that mass.
  void cut_vocabulary() {
    const bool whole = row_.top_p >= 1.0f;
    const double total = whole ? 0.0 : sums(row_.temperature).mass;
    // What is further away than this is less likely than min_p.
    const float furthest = row_.min_p > 0.0f ? 0.01f - std::log(row_.min_p) : HUGE_VALF;
    float reach = whole ? furthest : std::min(4.0f, furthest);
    while (fill_buckets_within(reach) < row_.top_p * total && reach < furthest)
      reach = reach < 32.0f ? std::min(reach + 3.0f, furthest) : furthest;
    const auto& masses = scratch_.masses;
    double before = 0.0;
    int64_t border = 0;
    while (border + 1 < kBuckets && (whole || (before + masses[border]) / total < row_.top_p))
      before += masses[border++];
    split_at(border);
    auto& list = scratch_.list;
    const Candidate first = {top(), 0};
    double mass = before;
    if (row_.min_p > 0.0f) {
      mass = 0.0;
      for (const Candidate& c : list) mass += ratio(c, first);
    }
    std::sort(scratch_.border.begin(), scratch_.border.end(), comes_before);
    for (const Candidate& c : scratch_.border) {
      const bool inside = whole || before / total < row_.top_p;
      const double r = ratio(c, first);
      if (!list.empty() && !(inside && r >= row_.min_p)) break;
      list.push_back(c);
      before += r;
      mass += r;
    }
    kept_ = static_cast<int64_t>(list.size());
    kept_lse_ = top() + std::log(mass);
  }

  // Sorts the tokens with z / temperature of at least top - reach into buckets; returns their mass.
  double fill_buckets_within(float reach) {
    auto& list = scratch_.list;
    list.clear();
    const float low = (top() - reach) * row_.temperature;
    for (const Candidate& tile : scratch_.tiles)
      if (tile.value > -HUGE_VALF && tile.value >= low) append_tile(tile.id, low);
    scratch_.values.clear();
    for (const Candidate& c : list) scratch_.values.push_back(c.value);
    scratch_.bucket_of.resize(list.size());
    scratch_.masses.assign(kBuckets, 0.0);
    SOFTGRPO_BEST(fill_buckets)(scratch_.bucket_of.data(), scratch_.masses.data(),
                                scratch_.values.data(), static_cast<int64_t>(list.size()),
                                row_.temperature, top());
    return std::accumulate(scratch_.masses.begin(), scratch_.masses.end(), 0.0);
  }

  // Of the tokens in buckets the list keeps those of buckets before this one, as far as min_p does;
  // border gets those of this one.
  void split_at(int64_t bucket) {
    auto& list = scratch_.list;
    scratch_.border.clear();
    const Candidate first = {top(), 0};
    int64_t kept = 0;
    for (size_t i = 0; i < list.size(); ++i) {
      const int64_t own = scratch_.bucket_of[i];
      const Candidate c = {list[i].value / row_.temperature, list[i].id};
      if (own == bucket)
        scratch_.border.push_back(c);
      else if (own < bucket && (row_.min_p <= 0.0f || ratio(c, first) >= row_.min_p))
        list[kept++] = c;
    }
    list.resize(kept);
  }

  Candidate argmax_of_kept() {
    const auto& list = scratch_.list;
    scratch_.ids.resize(kept_);
    scratch_.noise.resize(kept_);
    for (int64_t j = 0; j < kept_; ++j) scratch_.ids[j] = list[j].id;
    SOFTGRPO_BEST(gumbel_of_ids)(scratch_.noise.data(), scratch_.ids.data(), kept_, row_.key());
    Candidate best = {list[0].value + scratch_.noise[0], list[0].id};
    for (int64_t j = 1; j < kept_; ++j) {
      const Candidate other = {list[j].value + scratch_.noise[j], list[j].id};
      if (comes_before(other, best)) best = other;
    }
    return best;
  }

  void sample_greedy() {
    scratch_.list.clear();
    append_tile(best_tile_.id, best_tile_.value);
    const auto logp = static_cast<float>(-std::log(sums(1.0f).mass));
    slots_ = 1;
    write_slot(0, {{logp, scratch_.list[0].id}, logp});
  }

  void write_slot(int64_t j, const Slot& slot) {
    const int64_t at = b_ * args_.k_max + j;
    args_.ids[at] = slot.perturbed.id;
    args_.gprime[at] = slot.perturbed.value;
    args_.logp[at] = slot.logp;
  }

  // Everything that follows from the slots.
  void write_row() {
    const int64_t at = b_ * args_.k_max;
    const int32_t token = args_.ids[at];
    args_.n[b_] = static_cast<int32_t>(slots_);
    args_.token[b_] = token;
    args_.token_logp[b_] = args_.logp[at];
    const int32_t* terminal = args_.terminal_ids + b_ * args_.terminal_width;
    const bool ended = std::find(terminal, terminal + args_.terminal_width, token) !=
                       terminal + args_.terminal_width;
    args_.kind[b_] = soft() && !ended;
    write_weights(args_.weights + at, args_.gprime + at);
    if (args_.embed_out) write_embedding();
    if (args_.lse || args_.entropy) write_statistics();
    if (args_.kept_mass && !args_.kind[b_]) args_.kept_mass[b_] = kept_mass();
  }

  // Share of the vocabulary's mass, in which refined candidates count as they are.
  float kept_mass() const {
    if (row_.mode == kGreedy) return 1.0f;
    const double kept = std::exp(kept_lse_ - top());
    return static_cast<float>(kept / std::max(sums(row_.temperature).mass + refined_mass_, kept));
  }

  // soft_weights of the Python package: g' / tau in fp32, the rest in fp64, one rounding.
  void write_weights(float* weights, const float* gprime) {
    if (!args_.kind[b_]) {
      weights[0] = 1.0f;
      return;
    }
    double powers[kMaxCandidates];
    double total = 0.0;
    // Not always slot 0: a token that was drawn need not be the heaviest.
    const double best = *std::max_element(gprime, gprime + slots_) / row_.tau;
    for (int64_t j = 0; j < slots_; ++j) {
      const bool counts = static_cast<double>(gprime[0]) - gprime[j] <= row_.reach;
      total += powers[j] = counts ? std::exp(gprime[j] / row_.tau - best) : 0.0;
    }
    for (int64_t j = 0; j < slots_; ++j) weights[j] = static_cast<float>(powers[j] / total);
  }

  void write_embedding() {
    const int64_t at = b_ * args_.k_max;
    const int64_t bytes = args_.embed.width * (args_.embed.dtype == kFloat32 ? 4 : 2);
    soft_embedding_row(static_cast<char*>(args_.embed_out) + b_ * bytes, args_.ids + at,
                       args_.weights + at, args_.k_max, args_.embed);
  }

  void write_statistics() {
    const float temperature = row_.mode == kGreedy ? 1.0f : row_.temperature;
    const Sums s = sums(temperature);
    const double log_mass = std::log(s.mass);
    if (args_.lse)
      args_.lse[b_] = static_cast<float>(best_tile_.value / temperature + log_mass);
    if (args_.entropy) args_.entropy[b_] = static_cast<float>(log_mass - s.weighted / s.mass);
  }

  const SoftTokenArgs& args_;
  const int64_t b_;
  const Row row_;
  Scratch& scratch_;
  const T* z_;
  Candidate best_tile_ = {};
  int64_t kept_ = 0, slots_ = 0;
  double kept_lse_ = 0.0;  // log-sum-exp of the kept
  double refined_mass_ = 0.0;  // what the candidates' logits from the head add to the row's mass
};

template <class T>
void sample_rows(const SoftTokenArgs& args) {
#pragma omp parallel if (args.rows > 1)
  {
    thread_local Scratch scratch;  // its memory is kept
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < args.rows; ++b) RowSampler<T>(args, b, scratch).run();
  }
}

}  // namespace

void soft_token(const SoftTokenArgs& args) {
  switch (args.logits_dtype) {
    case kFloat32: return sample_rows<float>(args);
    case kBfloat16: return sample_rows<Bf16>(args);
    case kFloat16: return sample_rows<Half>(args);
  }
}

}  // namespace softgrpo

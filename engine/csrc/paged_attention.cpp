// Attention over paged keys and values: checks, the division of the work, and the threads.
#include "paged_attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#define SOFTGRPO_KERNEL "paged_attention.inc"
#include "shared/each_isa.h"

namespace softgrpo {
namespace {

int64_t max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

void check_sequence(const PagedAttention& a, int64_t b, int64_t begin, int64_t end) {
  const std::string name = "sequence " + std::to_string(b) + ": ";
  const int64_t length = a.seq_lens[b];
  if (begin > end || end > a.rows || begin < 0)
    throw std::invalid_argument("query_starts must rise from 0 to the " + std::to_string(a.rows) +
                                " rows of q");
  if (end - begin > length)
    throw std::invalid_argument(name + std::to_string(end - begin) + " queries, but seq_lens is " +
                                std::to_string(length) + " (it counts the queries too)");
  if (length > a.table_width * a.page_size)
    throw std::invalid_argument(name + "seq_lens is " + std::to_string(length) +
                                ", more than its block_table row can hold");
  for (int64_t i = 0; i * a.page_size < length; ++i) {
    const int32_t page = a.block_table[b * a.table_width + i];
    if (page < 0 || page >= a.num_pages)
      throw std::invalid_argument(name + "page " + std::to_string(page) + " of " +
                                  std::to_string(a.num_pages));
  }
}

// Cuts the queries of every sequence into blocks, after checking them.
std::vector<QueryBlock> query_blocks(const PagedAttention& a) {
  const int64_t group = a.num_heads / a.num_kv_heads;
  const int64_t block_queries = std::max<int64_t>(1, kRows / group);
  std::vector<QueryBlock> blocks;
  blocks.reserve(a.sequences + a.rows / block_queries);
  int64_t expected = 0;
  for (int64_t b = 0; b < a.sequences; ++b) {
    const int64_t begin = a.query_starts ? a.query_starts[b] : b;
    const int64_t end = a.query_starts ? a.query_starts[b + 1] : b + 1;
    check_sequence(a, b, begin, end);
    if (begin != expected) check_sequence(a, b, 1, 0);
    expected = end;
    for (int64_t row = begin; row < end; row += block_queries)
      blocks.push_back({b, row, a.seq_lens[b] - (end - row), std::min(block_queries, end - row)});
  }
  if (expected != a.rows) check_sequence(a, 0, 1, 0);
  return blocks;
}

template <class T>
class Attention {
 public:
  explicit Attention(const PagedAttention& args) : a_(args), blocks_(query_blocks(args)) {
    for (const QueryBlock& block : blocks_) {
      rows_ = std::max(rows_, block.queries * group_);
      splits_ = std::max(splits_, block.splits());
    }
  }

  void run() {
    // With few blocks over long contexts the splits of one block run in parallel.
    if (splits_ > 1 && tasks() < 4 * max_threads())
      run_splits();
    else
      run_blocks();
  }

 private:
  int64_t tasks() const { return static_cast<int64_t>(blocks_.size()) * a_.num_kv_heads; }
  int64_t state_floats() const { return rows_ * (width_ + 2); }

  SoftmaxState state_at(float* memory) const {
    return {memory + rows_ * width_, memory + rows_ * (width_ + 1), memory};
  }

  // Each thread keeps its memory: one allocation in the life of a thread, not one a call.
  float* thread_memory(int64_t floats) const {
    struct alignas(64) Line {
      float lanes[kMaxLanes];
    };
    thread_local std::vector<Line> memory;
    if (static_cast<int64_t>(memory.size()) * kMaxLanes < floats)
      memory.resize(floats / kMaxLanes + 1);
    return memory[0].lanes;
  }

  struct Thread {
    ChunkScratch chunk;
    SoftmaxState state, split;
  };

  Thread thread() const {
    const int64_t queries = rows_ * width_, keys = width_ * kMaxLanes;
    const int64_t scores = rows_ * kChunk, values = kChunk * width_;
    float* memory = thread_memory(queries + keys + scores + values + 2 * state_floats());
    float* states = memory + queries + keys + scores + values;
    return {{memory, memory + queries, memory + queries + keys, memory + queries + keys + scores},
            state_at(states),
            state_at(states + state_floats())};
  }

  const QueryBlock& block_of(int64_t task) const { return blocks_[task / a_.num_kv_heads]; }

  void attend_tasks(int64_t begin, int64_t end) const {
    Thread local = thread();
    for (int64_t task = begin; task < end; ++task) {
      const QueryBlock& block = block_of(task);
      const int64_t head = task % a_.num_kv_heads, next = task + 1;
      const KeyChunk after =
          next < end ? chunk_at(block_of(next), next % a_.num_kv_heads, 0) : KeyChunk{};
      for (int64_t split = 0; split < block.splits(); ++split) {
        const bool last = split + 1 == block.splits();
        attend_split_(a_, block, head, split,
                      last ? after : chunk_at(block, head, (split + 1) * kSplit), local.chunk,
                      split ? local.split : local.state);
        if (split) merge_split_(local.state, local.split, block.queries * group_, width_);
      }
      write_rows_(a_, block, head, local.state);
    }
  }

  // Every thread takes neighbouring tasks, of about the same number of scores, so that it knows
  // which keys it will read next.
  void run_blocks() const {
    std::vector<int64_t> scores(tasks() + 1, 0);
    for (int64_t task = 0; task < tasks(); ++task)
      scores[task + 1] = scores[task] + block_of(task).keys() * block_of(task).queries;
    const auto first_task = [&](int64_t thread, int64_t threads) {
      const int64_t share = scores.back() * thread / threads;
      return std::lower_bound(scores.begin(), scores.end(), share) - scores.begin();
    };
#pragma omp parallel if (tasks() > 1)
    {
#ifdef _OPENMP
      const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
#else
      const int64_t thread = 0, threads = 1;
#endif
      attend_tasks(first_task(thread, threads), first_task(thread + 1, threads));
    }
  }

  void run_splits() const {
    std::vector<float> states(tasks() * splits_ * state_floats());
    const auto state = [&](int64_t task, int64_t split) {
      return state_at(states.data() + (task * splits_ + split) * state_floats());
    };
#pragma omp parallel
    {
      Thread local = thread();
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < tasks() * splits_; ++i) {
        const int64_t task = i / splits_, split = i % splits_;
        const QueryBlock& block = blocks_[task / a_.num_kv_heads];
        if (split < block.splits())
          attend_split_(a_, block, task % a_.num_kv_heads, split, KeyChunk{}, local.chunk,
                        state(task, split));
      }
    }
    for (int64_t task = 0; task < tasks(); ++task) {
      const QueryBlock& block = blocks_[task / a_.num_kv_heads];
      for (int64_t split = 1; split < block.splits(); ++split)
        merge_split_(state(task, 0), state(task, split), block.queries * group_, width_);
      write_rows_(a_, block, task % a_.num_kv_heads, state(task, 0));
    }
  }

  const PagedAttention a_;
  const std::vector<QueryBlock> blocks_;
  const int64_t group_ = a_.num_heads / a_.num_kv_heads;
  const int64_t width_ = padded_dim(a_.head_dim);
  int64_t rows_ = 0, splits_ = 0;  // the most that a block has
  decltype(&portable::attend_split<T>) attend_split_ = SOFTGRPO_BEST(attend_split<T>);
  decltype(&portable::merge_split) merge_split_ = SOFTGRPO_BEST(merge_split);
  decltype(&portable::write_rows<T>) write_rows_ = SOFTGRPO_BEST(write_rows<T>);
};

}  // namespace

void paged_attention(const PagedAttention& args, bool bf16) {
  if (args.head_dim > kMaxHeadDim || (bf16 && args.head_dim % 2))
    throw std::invalid_argument("head_dim " + std::to_string(args.head_dim) +
                                ": must be even and at most " + std::to_string(kMaxHeadDim));
  if (bf16)
    Attention<Bf16>(args).run();
  else
    Attention<float>(args).run();
}

}  // namespace softgrpo

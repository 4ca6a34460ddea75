// The decoder's layers one after the other: the kernels of the ops, called without going back to
// Python between them.
#include "decoder_layers.h"

#include <cstring>
#include <vector>

#include "packed_linear.h"
#include "rms_norm.h"

namespace softgrpo {
namespace {

struct alignas(64) Line {
  char bytes[64];
};

// Activations between the kernels, kept from call to call.
class Scratch {
 public:
  explicit Scratch(int64_t element_bytes) : element_bytes_(element_bytes) { used_ = 0; }

  void reserve(int64_t elements, int64_t tensors) {
    const size_t lines = elements * element_bytes_ / sizeof(Line) + tensors;
    if (memory_.size() < lines) memory_.resize(lines);
  }

  void* take(int64_t elements) {
    void* start = memory_.data() + used_;
    used_ += (elements * element_bytes_ + sizeof(Line) - 1) / sizeof(Line);
    return start;
  }

 private:
  static thread_local std::vector<Line> memory_;
  int64_t element_bytes_;
  size_t used_;
};

thread_local std::vector<Line> Scratch::memory_;

void multiply(void* out, const void* x, const PackedMatrix& matrix, int64_t rows, int64_t width,
              int64_t columns, bool silu_mul, bool bf16) {
  linear({out, x, matrix.weight, matrix.bias, rows, width, columns, silu_mul}, bf16);
}

}  // namespace

void decoder_layers(void* out, void* x, const DecoderLayers& model, PagedAttention attention,
                    RopeStore rope, bool bf16) {
  const int64_t rows = rope.rows, hidden = model.hidden, inner = model.inner;
  const int64_t q_width = rope.num_heads * rope.head_dim;
  const int64_t qkv_width = q_width + 2 * rope.num_kv_heads * rope.head_dim;
  const int64_t element_bytes = bf16 ? 2 : 4;
  Scratch scratch(element_bytes);
  scratch.reserve(rows * (2 * hidden + qkv_width + 2 * q_width + inner), 6);
  void* const residual = scratch.take(rows * hidden);
  void* const normed = scratch.take(rows * hidden);
  void* const qkv = scratch.take(rows * qkv_width);
  void* const q = scratch.take(rows * q_width);
  void* const attended = scratch.take(rows * q_width);
  void* const activated = scratch.take(rows * inner);
  const int64_t layer_bytes =
      rope.num_pages * rope.num_kv_heads * rope.page_size * rope.head_dim * element_bytes;
  attention.q = rope.q = q;
  attention.out = attended;
  rope.qkv = qkv;
  std::memset(residual, 0, rows * hidden * element_bytes);
  for (int64_t l = 0; l < model.count; ++l) {
    const DecoderLayer& layer = model.layers[l];
    rms_norm(normed, residual, x, residual, layer.input_norm, rows, hidden, model.eps, bf16);
    multiply(qkv, normed, layer.qkv, rows, hidden, qkv_width, false, bf16);
    if (layer.q_norm)
      normalise_heads(qkv, layer.q_norm, layer.k_norm, rows, rope.num_heads, rope.num_kv_heads,
                      rope.head_dim, model.eps, bf16);
    rope_store_kv(rope, bf16);
    attention.k_pages = rope.k_pages;
    attention.v_pages = rope.v_pages;
    paged_attention(attention, bf16);
    multiply(x, attended, layer.output, rows, q_width, hidden, false, bf16);
    rms_norm(normed, residual, x, residual, layer.post_norm, rows, hidden, model.eps, bf16);
    multiply(activated, normed, layer.gate_up, rows, hidden, 2 * inner, true, bf16);
    multiply(x, activated, layer.down, rows, inner, hidden, false, bf16);
    rope.k_pages = static_cast<char*>(rope.k_pages) + layer_bytes;
    rope.v_pages = static_cast<char*>(rope.v_pages) + layer_bytes;
  }
  rms_norm(out, residual, x, residual, model.final_norm, rows, hidden, model.eps, bf16);
}

}  // namespace softgrpo

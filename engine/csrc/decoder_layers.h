// All layers of a decoder in one call; described in softgrpo_engine/ops/decoder_layers.py.
#pragma once
#include <cstdint>

#include "paged_attention.h"
#include "rope_store_kv.h"

namespace softgrpo {

struct PackedMatrix {
  const void* weight;  // as `pack_linear` leaves it
  const float* bias;   // or null
};

struct DecoderLayer {
  const void *input_norm, *post_norm;
  const void *q_norm, *k_norm;  // of the heads, or both null
  PackedMatrix qkv, output, gate_up, down;
};

struct DecoderLayers {
  const DecoderLayer* layers;
  const void* final_norm;
  int64_t count, hidden, inner;
  float eps;
};

// out [rows, hidden], normalised, from x [rows, hidden], which is overwritten. `attention` and
// `rope` say where the rows attend; their tensors of activations and pages are set here: the pages
// of layer l start l * (bytes of a layer's pages) after those given.
void decoder_layers(void* out, void* x, const DecoderLayers& model, PagedAttention attention,
                    RopeStore rope, bool bf16);

}  // namespace softgrpo

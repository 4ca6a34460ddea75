#include <pybind11/pybind11.h>

#include "decoder.h"

namespace softgrpo {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_rms_norm(uintptr_t out, uintptr_t total, uintptr_t x, uintptr_t residual,
                   uintptr_t weight, int64_t rows, int64_t hidden, float eps, bool bf16) {
  rms_norm(pointer<void>(out), pointer<void>(total), pointer<void>(x), pointer<void>(residual),
           pointer<void>(weight), rows, hidden, eps, bf16);
}

void bind_silu_mul(uintptr_t out, uintptr_t gate_up, int64_t rows, int64_t width, bool bf16) {
  silu_mul(pointer<void>(out), pointer<void>(gate_up), rows, width, bf16);
}

void bind_rope_store_kv(uintptr_t q, uintptr_t k_pages, uintptr_t v_pages, uintptr_t qkv,
                        uintptr_t cos, uintptr_t sin, uintptr_t slots, int64_t rows,
                        int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                        int64_t num_pages, int64_t page_size, bool bf16) {
  rope_store_kv({pointer<void>(q), pointer<void>(k_pages), pointer<void>(v_pages),
                 pointer<void>(qkv), pointer<float>(cos), pointer<float>(sin),
                 pointer<int64_t>(slots), rows, num_heads, num_kv_heads, head_dim, num_pages,
                 page_size},
                bf16);
}

void bind_paged_attention(uintptr_t out, uintptr_t q, uintptr_t k_pages, uintptr_t v_pages,
                          uintptr_t block_table, uintptr_t seq_lens, uintptr_t query_starts,
                          int64_t rows, int64_t sequences, int64_t table_width, int64_t num_pages,
                          int64_t page_size, int64_t num_heads, int64_t num_kv_heads,
                          int64_t head_dim, float scale, bool bf16) {
  const pybind11::gil_scoped_release release;
  paged_attention({pointer<void>(out), pointer<void>(q), pointer<void>(k_pages),
                   pointer<void>(v_pages), pointer<int32_t>(block_table),
                   pointer<int32_t>(seq_lens), pointer<int32_t>(query_starts), rows, sequences,
                   table_width, num_pages, page_size, num_heads, num_kv_heads, head_dim, scale},
                  bf16);
}

}  // namespace

void bind_decoder(pybind11::module_& m) {
  m.def("rms_norm", &bind_rms_norm);
  m.def("silu_mul", &bind_silu_mul);
  m.def("rope_store_kv", &bind_rope_store_kv);
  m.def("paged_attention", &bind_paged_attention);
}

}  // namespace softgrpo

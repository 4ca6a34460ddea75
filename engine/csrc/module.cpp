// The Python module softgrpo_engine.ops._cpu. As in kernels/csrc, every function takes addresses and
// sizes; the Python wrappers check shapes and dtypes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "decoder_layers.h"
#include "group_attention.h"
#include "machine_peaks.h"
#include "packed_linear.h"
#include "paged_attention.h"
#include "rms_norm.h"
#include "rope_store_kv.h"
#include "rotate_heads.h"
#include "shared/isa.h"
#include "shared/pointer.h"
#include "silu_mul.h"

namespace softgrpo {
namespace {

void bind_rms_norm(uintptr_t out, uintptr_t total, uintptr_t x, uintptr_t residual,
                   uintptr_t weight, int64_t rows, int64_t hidden, float eps, bool bf16) {
  rms_norm(pointer<void>(out), pointer<void>(total), pointer<void>(x), pointer<void>(residual),
           pointer<void>(weight), rows, hidden, eps, bf16);
}

void bind_rms_norm_backward(uintptr_t d_total, uintptr_t d_weights, uintptr_t d_out,
                            uintptr_t d_sum, uintptr_t total, uintptr_t weight, int64_t rows,
                            int64_t hidden, int64_t parts, float eps, bool bf16) {
  rms_norm_backward(pointer<void>(d_total), pointer<float>(d_weights), pointer<void>(d_out),
                    pointer<void>(d_sum), pointer<void>(total), pointer<void>(weight), rows, hidden,
                    parts, eps, bf16);
}

void bind_silu_mul(uintptr_t out, uintptr_t gate, uintptr_t up, int64_t stride, int64_t rows,
                   int64_t width, bool bf16) {
  silu_mul(pointer<void>(out), pointer<void>(gate), pointer<void>(up), stride, rows, width, bf16);
}

void bind_silu_mul_backward(uintptr_t d_gate_up, uintptr_t d_out, uintptr_t gate, uintptr_t up,
                            int64_t stride, int64_t rows, int64_t width, bool bf16) {
  silu_mul_backward(pointer<void>(d_gate_up), pointer<void>(d_out), pointer<void>(gate),
                    pointer<void>(up), stride, rows, width, bf16);
}

void bind_rotate_heads(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t qkv, uintptr_t cos,
                       uintptr_t sin, uintptr_t copy_starts, uintptr_t copies, int64_t rows,
                       int64_t count, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                       bool backward, bool bf16) {
  const RotateHeads args{pointer<void>(q),           pointer<void>(k),   pointer<void>(v),
                         pointer<void>(qkv),         pointer<float>(cos), pointer<float>(sin),
                         pointer<int32_t>(copy_starts), pointer<int32_t>(copies), rows, count,
                         num_heads, num_kv_heads, head_dim};
  backward ? rotate_heads_backward(args, bf16) : rotate_heads(args, bf16);
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

// The addresses of a GroupAttention in its order.
void bind_group_attention(const std::vector<uintptr_t>& at, int64_t tokens, int64_t num_spans,
                          int64_t num_groups, int64_t num_heads, int64_t num_kv_heads,
                          int64_t head_dim, float scale, bool backward, bool bf16) {
  const pybind11::gil_scoped_release release;
  const GroupAttention args{pointer<void>(at[0]), pointer<float>(at[1]), pointer<void>(at[2]),
                            pointer<void>(at[3]), pointer<void>(at[4]), pointer<void>(at[5]),
                            pointer<void>(at[6]), pointer<void>(at[7]), pointer<void>(at[8]),
                            pointer<Span>(at[9]), pointer<int64_t>(at[10]), tokens, num_spans,
                            num_groups, num_heads, num_kv_heads, head_dim, scale};
  backward ? group_attention_backward(args, bf16) : group_attention(args, bf16);
}

void bind_pack_linear(uintptr_t packed, uintptr_t weight, int64_t columns, int64_t width,
                      bool bf16) {
  const pybind11::gil_scoped_release release;
  pack_linear(pointer<void>(packed), pointer<void>(weight), columns, width, bf16);
}

void bind_linear(uintptr_t out, uintptr_t x, uintptr_t weight, uintptr_t bias, int64_t rows,
                 int64_t width, int64_t columns, bool silu_mul, bool bf16) {
  const pybind11::gil_scoped_release release;
  linear({pointer<void>(out), pointer<void>(x), pointer<void>(weight), pointer<float>(bias), rows,
          width, columns, silu_mul},
         bf16);
}

// The addresses of a layer in the order of DecoderLayer.
DecoderLayer layer_at(const uintptr_t* a) {
  const auto matrix = [a](int i) {
    return PackedMatrix{pointer<void>(a[i]), pointer<float>(a[i + 1])};
  };
  return {pointer<void>(a[0]), pointer<void>(a[1]), pointer<void>(a[2]), pointer<void>(a[3]),
          matrix(4), matrix(6), matrix(8), matrix(10)};
}

void bind_decoder_layers(uintptr_t out, uintptr_t x, uintptr_t layers, uintptr_t final_norm,
                         int64_t count, int64_t hidden, int64_t inner, float eps, uintptr_t cos,
                         uintptr_t sin, uintptr_t k_pages, uintptr_t v_pages, uintptr_t slots,
                         uintptr_t block_table, uintptr_t seq_lens, uintptr_t query_starts,
                         int64_t rows, int64_t sequences, int64_t table_width, int64_t num_pages,
                         int64_t page_size, int64_t num_heads, int64_t num_kv_heads,
                         int64_t head_dim, float scale, bool bf16) {
  constexpr int64_t kAddresses = 12;
  const pybind11::gil_scoped_release release;
  std::vector<DecoderLayer> table;
  for (int64_t l = 0; l < count; ++l)
    table.push_back(layer_at(pointer<uintptr_t>(layers) + l * kAddresses));
  const PagedAttention attention{
      nullptr, nullptr, pointer<void>(k_pages), pointer<void>(v_pages),
      pointer<int32_t>(block_table), pointer<int32_t>(seq_lens), pointer<int32_t>(query_starts),
      rows, sequences, table_width, num_pages, page_size, num_heads, num_kv_heads, head_dim, scale};
  const RopeStore rope{nullptr, pointer<void>(k_pages), pointer<void>(v_pages), nullptr,
                       pointer<float>(cos), pointer<float>(sin), pointer<int64_t>(slots), rows,
                       num_heads, num_kv_heads, head_dim, num_pages, page_size};
  decoder_layers(pointer<void>(out), pointer<void>(x),
                 {table.data(), pointer<void>(final_norm), count, hidden, inner, eps}, attention,
                 rope, bf16);
}

}  // namespace
}  // namespace softgrpo

PYBIND11_MODULE(_cpu, m) {
  using namespace softgrpo;
  m.doc() = "C++ CPU kernels of softgrpo_engine.ops";
  m.def("limit_isa", [](int level) { isa_limit = level; },
        "For tests: 0 portable, 1 AVX2, 2 AVX-512.");
  m.def("isa", [] { return best_isa(); }, "What runs: 0 portable, 1 AVX2, 2 AVX-512.");
  m.def("rms_norm", &bind_rms_norm);
  m.def("rms_norm_backward", &bind_rms_norm_backward);
  m.def("silu_mul", &bind_silu_mul);
  m.def("silu_mul_backward", &bind_silu_mul_backward);
  m.def("rotate_heads", &bind_rotate_heads);
  m.def("rope_store_kv", &bind_rope_store_kv);
  m.def("paged_attention", &bind_paged_attention);
  m.def("group_attention", &bind_group_attention);
  m.def("pack_linear", &bind_pack_linear);
  m.def("linear", &bind_linear);
  m.def("decoder_layers", &bind_decoder_layers);
  m.def("multiply_in_registers", &multiply_in_registers, "Operations done; for benchmarks.");
  m.def("read_memory", [](uintptr_t memory, int64_t bytes) {
    return read_memory(pointer<float>(memory), bytes);
  }, "For benchmarks.");
  m.def("matrix_unit", &matrix_unit, "What multiplies bf16 here: amx, avx512_bf16 or nothing.");
  m.def("limit_matrix_unit", &limit_matrix_unit, "For tests: 0 lanes, 1 AVX512-BF16, 2 AMX.");
}

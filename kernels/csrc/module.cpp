// The Python module softgrpo_kernels._cpu. Every function takes addresses and sizes as integers,
// so that the build needs no torch; the Python wrappers check shapes and dtypes.
#include <pybind11/pybind11.h>

#include "embedding_noise.h"
#include "gumbel_noise.h"
#include "indexed_dot.h"
#include "shared/isa.h"
#include "shared/pointer.h"
#include "soft_embedding.h"
#include "soft_token.h"

namespace softgrpo {
namespace {

// Addresses and sizes by name: soft_token has too many for a list.
class Arguments {
 public:
  explicit Arguments(const pybind11::kwargs& kwargs) : kwargs_(kwargs) {}

  int64_t integer(const char* name) const { return kwargs_[name].cast<int64_t>(); }
  float real(const char* name) const { return kwargs_[name].cast<float>(); }
  Dtype dtype(const char* name) const { return static_cast<Dtype>(integer(name)); }

  template <class T>
  T* pointer(const char* name) const {
    return softgrpo::pointer<T>(kwargs_[name].cast<uintptr_t>());
  }

 private:
  const pybind11::kwargs& kwargs_;
};

void bind_soft_token(const pybind11::kwargs& kwargs) {
  const Arguments in(kwargs);
  SoftTokenArgs args;
  args.logits = in.pointer<void>("logits");
  args.logits_dtype = in.dtype("logits_dtype");
  args.rows = in.integer("rows");
  args.vocabulary = in.integer("vocabulary");
  args.logits_stride = in.integer("logits_stride");
  args.k_max = in.integer("k_max");
  args.floats = in.pointer<float>("floats");
  args.ints = in.pointer<int64_t>("ints");
  args.terminal_ids = in.pointer<int32_t>("terminal_ids");
  args.terminal_width = in.integer("terminal_width");
  args.hidden = in.pointer<void>("hidden");
  args.hidden_stride = in.integer("hidden_stride");
  args.lm_head = {in.pointer<void>("lm_head"), in.integer("lm_head_stride"),
                  in.integer("lm_head_width"), in.dtype("lm_head_dtype")};
  args.joint = in.integer("joint") != 0;
  args.bias = in.pointer<float>("bias");
  args.softcap = in.real("softcap");
  args.logit_scale = in.real("logit_scale");
  args.embed = {in.pointer<void>("embed"), in.integer("embed_stride"), in.integer("embed_width"),
                in.dtype("embed_dtype")};
  args.ids = in.pointer<int32_t>("out_ids");
  args.gprime = in.pointer<float>("out_gprime");
  args.weights = in.pointer<float>("out_weights");
  args.logp = in.pointer<float>("out_logp");
  args.n = in.pointer<int32_t>("out_n");
  args.token = in.pointer<int32_t>("out_token");
  args.token_logp = in.pointer<float>("out_token_logp");
  args.kind = in.pointer<uint8_t>("out_kind");
  args.valid = in.pointer<bool>("out_valid");
  args.embed_out = in.pointer<void>("out_embed");
  args.lse = in.pointer<float>("out_lse");
  args.entropy = in.pointer<float>("out_entropy");
  args.kept_mass = in.pointer<float>("out_kept_mass");
  const pybind11::gil_scoped_release release;
  soft_token(args);
}

void bind_soft_embedding(uintptr_t out, uintptr_t ids, uintptr_t weights, int64_t rows,
                         int64_t slots, uintptr_t table, int64_t stride, int64_t width,
                         int64_t dtype) {
  soft_embedding(pointer<void>(out), pointer<int32_t>(ids), pointer<float>(weights), rows, slots,
                 {pointer<void>(table), stride, width, static_cast<Dtype>(dtype)});
}

void bind_gumbel_noise(uintptr_t out, uintptr_t ids, uintptr_t seed, uintptr_t position,
                       uintptr_t uid, uintptr_t stream, int64_t rows, int64_t width) {
  gumbel_noise({pointer<float>(out), pointer<int32_t>(ids), pointer<int64_t>(seed),
                pointer<int64_t>(position), pointer<int64_t>(uid), pointer<int64_t>(stream), rows,
                width});
}

void bind_embedding_noise(uintptr_t out, uintptr_t seed, uintptr_t position, uintptr_t uid,
                          uintptr_t stream, int64_t rows, int64_t size) {
  const pybind11::gil_scoped_release release;
  embedding_noise({pointer<float>(out), pointer<int64_t>(seed), pointer<int64_t>(position),
                   pointer<int64_t>(uid), pointer<int64_t>(stream), rows, size});
}

void bind_indexed_dot(uintptr_t out, uintptr_t hidden, int64_t hidden_stride, uintptr_t ids,
                      int64_t rows, int64_t slots, uintptr_t table, int64_t table_stride,
                      int64_t width, int64_t dtype) {
  const pybind11::gil_scoped_release release;
  indexed_dot({pointer<float>(out), pointer<void>(hidden), hidden_stride, pointer<int32_t>(ids),
               rows, slots,
               {pointer<void>(table), table_stride, width, static_cast<Dtype>(dtype)}});
}

int64_t bind_sort_ids(uintptr_t keys, uintptr_t spare, uintptr_t ids, int64_t count) {
  const pybind11::gil_scoped_release release;
  return sort_ids(pointer<uint64_t>(keys), pointer<uint64_t>(spare), pointer<int32_t>(ids), count);
}

void bind_segment_sums(uintptr_t out, uintptr_t row_ids, int64_t out_stride, int64_t out_dtype,
                       uintptr_t keys, int64_t pairs, uintptr_t grad, uintptr_t hidden,
                       int64_t slots, int64_t hidden_stride, int64_t width, int64_t hidden_dtype) {
  const pybind11::gil_scoped_release release;
  segment_sums({pointer<void>(out), pointer<int64_t>(row_ids), out_stride,
                static_cast<Dtype>(out_dtype), pointer<uint64_t>(keys), pairs, pointer<float>(grad),
                pointer<void>(hidden), slots, hidden_stride, width,
                static_cast<Dtype>(hidden_dtype)});
}

#define COLUMN(name) names.append(#name);
pybind11::list float_columns() {
  pybind11::list names;
  SOFTGRPO_FLOAT_COLUMNS(COLUMN)
  return names;
}

pybind11::list int_columns() {
  pybind11::list names;
  SOFTGRPO_INT_COLUMNS(COLUMN)
  return names;
}
#undef COLUMN

}  // namespace
}  // namespace softgrpo

PYBIND11_MODULE(_cpu, m) {
  using namespace softgrpo;
  m.doc() = "C++ CPU kernels of softgrpo_kernels";
  m.def("limit_isa", [](int level) { isa_limit = level; },
        "For tests: 0 portable, 1 AVX2, 2 AVX-512.");
  m.attr("FLOAT_COLUMNS") = float_columns();
  m.attr("INT_COLUMNS") = int_columns();
  m.def("soft_token", &bind_soft_token);
  m.def("soft_embedding", &bind_soft_embedding);
  m.def("gumbel_noise", &bind_gumbel_noise);
  m.def("embedding_noise", &bind_embedding_noise);
  m.def("indexed_dot", &bind_indexed_dot);
  m.def("sort_ids", &bind_sort_ids);
  m.def("segment_sums", &bind_segment_sums);
}

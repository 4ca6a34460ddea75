#include <pybind11/pybind11.h>

#include "noise.h"
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
    return reinterpret_cast<T*>(kwargs_[name].cast<uintptr_t>());
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
  const pybind11::gil_scoped_release release;
  soft_token(args);
}

void bind_soft_embedding(uintptr_t out, uintptr_t ids, uintptr_t weights, int64_t rows,
                         int64_t slots, uintptr_t table, int64_t stride, int64_t width,
                         int64_t dtype) {
  soft_embedding(reinterpret_cast<void*>(out), reinterpret_cast<int32_t*>(ids),
                 reinterpret_cast<float*>(weights), rows, slots,
                 {reinterpret_cast<void*>(table), stride, width, static_cast<Dtype>(dtype)});
}

void bind_gumbel_noise(uintptr_t out, uintptr_t ids, uintptr_t seed, uintptr_t position,
                       uintptr_t uid, uintptr_t stream, int64_t rows, int64_t width) {
  const auto key = [](uintptr_t address) { return reinterpret_cast<int64_t*>(address); };
  gumbel_noise({reinterpret_cast<float*>(out), reinterpret_cast<int32_t*>(ids), key(seed),
                key(position), key(uid), key(stream), rows, width});
}

}  // namespace

void bind_sampling(pybind11::module_& m) {
  m.def("soft_token", &bind_soft_token);
  m.def("soft_embedding", &bind_soft_embedding);
  m.def("gumbel_noise", &bind_gumbel_noise);
}

}  // namespace softgrpo

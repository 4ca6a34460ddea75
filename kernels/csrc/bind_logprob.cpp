#include <pybind11/pybind11.h>

#include "indexed_dot.h"
#include "shared/pointer.h"

namespace softgrpo {
namespace {

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

}  // namespace

void bind_logprob(pybind11::module_& m) {
  m.def("indexed_dot", &bind_indexed_dot);
  m.def("sort_ids", &bind_sort_ids);
  m.def("segment_sums", &bind_segment_sums);
}

}  // namespace softgrpo

#include <pybind11/pybind11.h>

#include "linear.h"

namespace softgrpo {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
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

}  // namespace

void bind_linear_layers(pybind11::module_& m) {
  m.def("pack_linear", &bind_pack_linear);
  m.def("linear", &bind_linear);
  m.def("matrix_unit", &matrix_unit, "What multiplies bf16 here: amx, avx512_bf16 or nothing.");
  m.def("limit_matrix_unit", &limit_matrix_unit, "For tests: 0 lanes, 1 AVX512-BF16, 2 AMX.");
}

}  // namespace softgrpo

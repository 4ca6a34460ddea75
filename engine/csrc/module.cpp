// The Python module softgrpo_engine.ops._cpu; as kernels/csrc/module.cpp.
#include <pybind11/pybind11.h>

#include "shared/isa.h"

namespace softgrpo {
void bind_decoder(pybind11::module_& m);
void bind_linear_layers(pybind11::module_& m);
}  // namespace softgrpo

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ CPU kernels of softgrpo_engine.ops";
  m.def("limit_isa", [](int level) { softgrpo::isa_limit = level; },
        "For tests: 0 portable, 1 AVX2, 2 AVX-512.");
  softgrpo::bind_decoder(m);
  softgrpo::bind_linear_layers(m);
}

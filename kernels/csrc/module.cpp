// The Python module softgrpo_kernels._cpu. Every function takes addresses and sizes as integers,
// so that the build needs no torch; the Python wrappers check shapes and dtypes.
#include <pybind11/pybind11.h>

#include "shared/isa.h"

namespace softgrpo {
void bind_sampling(pybind11::module_& m);
void bind_logprob(pybind11::module_& m);
}  // namespace softgrpo

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ CPU kernels of softgrpo_kernels";
  m.def("limit_isa", [](int level) { softgrpo::isa_limit = level; },
        "For tests: 0 portable, 1 AVX2, 2 AVX-512.");
  softgrpo::bind_sampling(m);
  softgrpo::bind_logprob(m);
}

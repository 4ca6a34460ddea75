// The Python module softgrpo_kernels._cpu. Every function takes addresses and sizes as integers,
// so that the build needs no torch; the Python wrappers check shapes and dtypes.
#include <pybind11/pybind11.h>

namespace softgrpo {
void bind_sampling(pybind11::module_& m);
void bind_decoder(pybind11::module_& m);
void bind_logprob(pybind11::module_& m);
void bind_linear_layers(pybind11::module_& m);
}  // namespace softgrpo

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ CPU kernels of softgrpo_kernels";
  softgrpo::bind_sampling(m);
  softgrpo::bind_decoder(m);
  softgrpo::bind_logprob(m);
  softgrpo::bind_linear_layers(m);
}

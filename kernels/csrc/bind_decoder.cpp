#include <pybind11/pybind11.h>

namespace softgrpo {
void bind_decoder(pybind11::module_&) {}
}  // namespace softgrpo

// Tensors come from Python as addresses: the build needs no torch.
#pragma once
#include <cstdint>

namespace softgrpo {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace softgrpo

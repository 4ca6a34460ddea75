// What this CPU can do at best, for benchmarks: products in registers, reads of memory.
#pragma once
#include <cstdint>

namespace softgrpo {

// Every thread multiplies in registers with what `linear` multiplies bf16 with, `count` times a fixed
// block; returns the operations (two a product) of all threads.
double multiply_in_registers(int64_t count);

// All threads read `bytes` of memory, a part each; the sum of its words, so that nothing is left out.
float read_memory(const float* memory, int64_t bytes);

}  // namespace softgrpo

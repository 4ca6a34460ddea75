// Which instruction set this machine runs.
#pragma once
#include "simd.h"

#define ISA_PORTABLE 0
#define ISA_AVX2 1
#define ISA_AVX512 2

namespace softgrpo {

// Lowered by tests only, which compare the instruction sets.
inline int isa_limit = ISA_AVX512;

inline int best_isa() {
#ifdef SOFTGRPO_X86
  static const int machine = [] {
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return ISA_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return ISA_AVX2;
    return ISA_PORTABLE;
  }();
  return machine < isa_limit ? machine : isa_limit;
#else
  return ISA_PORTABLE;
#endif
}

}  // namespace softgrpo

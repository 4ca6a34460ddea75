// Sixteen fp32 lanes in GCC/Clang vector types, which compile on every architecture.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#define SOFTGRPO_X86 1
#include <immintrin.h>
#endif

namespace softgrpo {

constexpr int64_t kLanes = 16;

typedef float F32x16 __attribute__((vector_size(64)));
typedef int32_t I32x16 __attribute__((vector_size(64)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));

struct Bf16 {
  uint16_t bits;
};

// 32 consecutive elements. Of bf16, `first` holds the even and `second` the odd ones: each comes
// out of its 32-bit word by one shift or mask. Of floats, the first and the last sixteen.
struct F32x32 {
  F32x16 first, second;
};

}  // namespace softgrpo

// What the vector code of every instruction set shares.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#define SOFTGRPO_X86 1
#include <immintrin.h>
#elif defined(__aarch64__)
#define SOFTGRPO_NEON 1
#include <arm_neon.h>
#endif

namespace softgrpo {

constexpr int64_t kMaxLanes = 16;

struct Bf16 {
  uint16_t bits;
};

}  // namespace softgrpo

// Includes the file SOFTGRPO_KERNEL once for each instruction set, in a namespace of its own: the
// same source in 128-, 256- and 512-bit code. `best_isa` says which one this machine runs.
// (Function attributes instead of compiler flags: no inline function of the standard library can
// be compiled for a newer machine and then be picked by the linker for all.)
#pragma once
#include "isa.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own intrinsics start from a register that is undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define ISA ISA_PORTABLE
#define ISA_TARGET
namespace softgrpo {
namespace {
namespace portable {
#include "simd_ops.inc"
#include SOFTGRPO_KERNEL
}  // namespace portable
}  // namespace
}  // namespace softgrpo
#undef ISA
#undef ISA_TARGET

#ifdef SOFTGRPO_X86
#define ISA ISA_AVX2
#define ISA_TARGET __attribute__((target("avx2,fma")))
namespace softgrpo {
namespace {
namespace avx2 {
#include "simd_ops.inc"
#include SOFTGRPO_KERNEL
}  // namespace avx2
}  // namespace
}  // namespace softgrpo
#undef ISA
#undef ISA_TARGET

#define ISA ISA_AVX512
#define ISA_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
namespace softgrpo {
namespace {
namespace avx512 {
#include "simd_ops.inc"
#include SOFTGRPO_KERNEL
}  // namespace avx512
}  // namespace
}  // namespace softgrpo
#undef ISA
#undef ISA_TARGET
#endif

// The function NAME of the best instruction set.
#ifdef SOFTGRPO_X86
#define SOFTGRPO_BEST(NAME)                          \
  (best_isa() == ISA_AVX512 ? &::softgrpo::avx512::NAME \
   : best_isa() == ISA_AVX2 ? &::softgrpo::avx2::NAME   \
                            : &::softgrpo::portable::NAME)
#else
#define SOFTGRPO_BEST(NAME) (&::softgrpo::portable::NAME)
#endif

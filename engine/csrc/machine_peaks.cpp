#include "machine_peaks.h"

#include <cstring>

#include "packed_linear.h"
#include "shared/simd.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__linux__) && defined(SOFTGRPO_X86)
#define SOFTGRPO_AMX 1
#endif

#define SOFTGRPO_KERNEL "machine_peaks.inc"
#include "shared/each_isa.h"

namespace softgrpo {
namespace {

#ifdef SOFTGRPO_X86
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))) double
multiply_bf16_pairs(int64_t count, float* sink) {
  constexpr int kSums = 12;
  __m512 sums[kSums];
  for (int j = 0; j < kSums; ++j) sums[j] = _mm512_set1_ps(j);
  const __m512bh a = (__m512bh)_mm512_set1_ps(sink[0]), b = (__m512bh)_mm512_set1_ps(sink[1]);
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < kSums; ++j) sums[j] = _mm512_dpbf16_ps(sums[j], a, b);
  __m512 total = sums[0];
  for (int j = 1; j < kSums; ++j) total = _mm512_add_ps(total, sums[j]);
  sink[2] = _mm512_reduce_add_ps(total);
  return 2.0 * kSums * 32 * count;
}
#endif

#ifdef SOFTGRPO_AMX
__attribute__((target("amx-tile,amx-bf16"))) double multiply_tiles(int64_t count, float*) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shapes;
  __asm__ volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);  // which zeroes the tiles
  for (int64_t i = 0; i < count; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 2.0 * 4 * 16 * 16 * 32 * count;
}
#endif

}  // namespace

double multiply_in_registers(int64_t count) {
  double operations = 0.0;
  auto multiply = SOFTGRPO_BEST(multiply_lanes);
#ifdef SOFTGRPO_X86
  if (std::strcmp(matrix_unit(), "avx512_bf16") == 0) multiply = multiply_bf16_pairs;
#endif
#ifdef SOFTGRPO_AMX
  if (std::strcmp(matrix_unit(), "amx") == 0) multiply = multiply_tiles;
#endif
#pragma omp parallel reduction(+ : operations)
  {
    float sink[3] = {1.0f, 0.5f, 0.0f};
    operations += multiply(count, sink);
    __asm__ volatile("" : : "r"(sink) : "memory");
  }
  return operations;
}

float read_memory(const float* memory, int64_t bytes) {
  float sum = 0.0f;
  const auto read = SOFTGRPO_BEST(sum_memory);
#pragma omp parallel reduction(+ : sum)
  {
#ifdef _OPENMP
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
#else
    const int64_t thread = 0, threads = 1;
#endif
    const int64_t count = bytes / sizeof(float);
    const int64_t first = count * thread / threads, end = count * (thread + 1) / threads;
    sum += read(memory + first, end - first);
  }
  return sum;
}

}  // namespace softgrpo

// Linear layers with packed weights: the products on matrix units where the machine has them, the
// division of the work, and the threads. An element is one sum in ascending k on whatever unit, so
// that a row has the same bits in every batch and with every number of threads.
#include "packed_linear.h"

#include <algorithm>
#include <vector>

#include "shared/simd.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#define SOFTGRPO_AMX 1
#endif

#define SOFTGRPO_KERNEL "packed_linear.inc"
#include "shared/each_isa.h"

namespace softgrpo {
namespace {

// Activations of so many rows stay in the second-level cache while the weight passes.
constexpr int64_t kChunkRows = 256;
// Below so many multiplications starting the threads costs more than it saves.
constexpr int64_t kParallelProducts = 1 << 18;

#ifdef SOFTGRPO_X86
#define BF16_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))

// The weight is asked for into the second-level cache so far ahead; behind the end of a tile lies the
// next one. A Zen 4 core does not by itself: the products of 8 rows waited for memory a third of the
// time. Not by _mm_prefetch: GCC takes it for a read of all memory and stores the sums before it.
constexpr int64_t kPrefetchBytes = 4096;

inline void prefetch(const Bf16* weight) {
  __asm__ volatile("prefetcht1 %c1(%0)" : : "r"(weight), "i"(kPrefetchBytes));
}

template <int kRows>
BF16_TARGET inline void multiply_rows_bf16(float* out, const Bf16* x, int64_t width,
                                           const Bf16* weight) {
  __m512 sums[kRows][2];
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  const Bf16* second = weight + kTileColumns * width;
  for (int64_t k = 0; k < width; k += 2) {
    prefetch(weight + k * kTileColumns);
    prefetch(second + k * kTileColumns);
    const __m512bh w0 = (__m512bh)_mm512_loadu_si512(weight + k * kTileColumns);
    const __m512bh w1 = (__m512bh)_mm512_loadu_si512(second + k * kTileColumns);
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * width + k, sizeof pair);
      const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], value, w0);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], value, w1);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < 2; ++j)
      _mm512_storeu_ps(out + r * kBlockColumns + j * kTileColumns, sums[r][j]);
}

BF16_TARGET void multiply_block_bf16(float* out, const Bf16* x, int64_t width, const Bf16* weight,
                                     int64_t rows) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8)
    multiply_rows_bf16<8>(out + r * kBlockColumns, x + r * width, width, weight);
  for (; r + 2 <= rows; r += 2)
    multiply_rows_bf16<2>(out + r * kBlockColumns, x + r * width, width, weight);
  for (; r < rows; ++r)
    multiply_rows_bf16<1>(out + r * kBlockColumns, x + r * width, width, weight);
}
#endif

#ifdef SOFTGRPO_AMX
#define AMX_TARGET __attribute__((target("amx-tile,amx-bf16")))

// The operating system gives the tile registers to processes that ask for them.
bool amx_is_granted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3: sums of (upper, lower) rows and (first, second) columns; 4, 5: rows; 6, 7: columns.
AMX_TARGET void shape_tiles(int64_t rows) {
  TileShapes shapes;
  const uint8_t upper = std::min<int64_t>(rows, 16), lower = rows - upper;
  const uint8_t heights[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
  for (int i = 0; i < 8; ++i) {
    shapes.rows[i] = heights[i];
    shapes.row_bytes[i] = heights[i] ? 64 : 0;
  }
  // GCC believes that the intrinsic reads only the first eight bytes.
  __asm__ volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
}

AMX_TARGET void release_tiles() { _tile_release(); }

// The tiles of one thread: shaped anew when the number of rows changes, given back at the end.
class Tiles {
 public:
  explicit Tiles(bool used) : used_(used) {}
  ~Tiles() {
    if (rows_) release_tiles();
  }
  void shape(int64_t rows) {
    if (used_ && rows != rows_) shape_tiles(rows_ = rows);
  }

 private:
  const bool used_;
  int64_t rows_ = 0;
};

// The tiles have been shaped for these rows.
AMX_TARGET void multiply_block_amx(float* out, const Bf16* x, int64_t width, const Bf16* weight,
                                   int64_t rows) {
  constexpr int64_t kDepth = 32, kTileBytes = 64, kOutBytes = kBlockColumns * sizeof(float);
  const int64_t x_bytes = width * sizeof(Bf16);
  const Bf16* second = weight + kTileColumns * width;
  _tile_zero(0);
  _tile_zero(1);
  if (rows > 16) {
    const Bf16* lower = x + 16 * width;
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < width; k += kDepth) {
      _tile_loadd(6, weight + k * kTileColumns, kTileBytes);
      _tile_loadd(4, x + k, x_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, second + k * kTileColumns, kTileBytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, lower + k, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(2, out + 16 * kBlockColumns, kOutBytes);
    _tile_stored(3, out + 16 * kBlockColumns + kTileColumns, kOutBytes);
  } else {
    for (int64_t k = 0; k < width; k += kDepth) {
      _tile_loadd(4, x + k, x_bytes);
      _tile_loadd(6, weight + k * kTileColumns, kTileBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, second + k * kTileColumns, kTileBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
  }
  _tile_stored(0, out, kOutBytes);
  _tile_stored(1, out + kTileColumns, kOutBytes);
}
#else
struct Tiles {
  explicit Tiles(bool) {}
  void shape(int64_t) {}
};
#endif

enum Unit { kLanesOnly, kAvx512Bf16, kAmx };
int unit_limit = kAmx;

// What multiplies bf16 here.
int bf16_unit() {
#ifdef SOFTGRPO_X86
  static const int machine = [] {
#ifdef SOFTGRPO_AMX
    if (amx_is_granted()) return kAmx;
#endif
    return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kLanesOnly;
  }();
  return best_isa() == ISA_AVX512 ? std::min(machine, unit_limit) : kLanesOnly;
#else
  return kLanesOnly;
#endif
}

// Rows of x [kBlockRows, width] times a block of the weight.
template <class X, class T>
using Multiply = void (*)(float*, const X*, int64_t, const T*, int64_t);

template <class X, class T>
void run(const Linear& a, const X* x, Multiply<X, T> multiply, bool uses_tiles = false) {
  const auto finish = SOFTGRPO_BEST(finish_block<T>);
  const int64_t blocks = (a.columns + kBlockColumns - 1) / kBlockColumns;
  const int64_t tasks = blocks * ((a.rows + kChunkRows - 1) / kChunkRows);
#pragma omp parallel if (a.rows * a.width * a.columns > kParallelProducts)
  {
#ifdef _OPENMP
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
#else
    const int64_t thread = 0, threads = 1;
#endif
    alignas(64) float block[kBlockRows * kBlockColumns];
    Tiles tiles(uses_tiles);
    for (int64_t task = thread * tasks / threads; task < (thread + 1) * tasks / threads; ++task) {
      const int64_t column = task % blocks * kBlockColumns, first = task / blocks * kChunkRows;
      const int64_t end = std::min(first + kChunkRows, a.rows);
      const T* weight = static_cast<const T*>(a.weight) + column * a.width;
      for (int64_t row = first; row < end; row += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, end - row);
        tiles.shape(rows);
        multiply(block, x + row * a.width, a.width, weight, rows);
        finish(a, block, row, rows, column);
      }
    }
  }
}

// x as fp32: what lanes multiply is converted once, not once for every block of columns.
const float* widened(const Linear& a) {
  thread_local std::vector<float> memory;
  const int64_t count = a.rows * a.width;
  if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  const auto widen = SOFTGRPO_BEST(widen);
  float* const out = memory.data();
  const Bf16* const x = static_cast<const Bf16*>(a.x);
#pragma omp parallel for if (count > kParallelProducts)
  for (int64_t row = 0; row < a.rows; ++row)
    widen(out + row * a.width, x + row * a.width, a.width);
  return out;
}

void run_bf16(const Linear& a, [[maybe_unused]] int unit) {
#ifdef SOFTGRPO_AMX
  if (unit == kAmx) return run<Bf16, Bf16>(a, static_cast<const Bf16*>(a.x), multiply_block_amx, true);
#endif
#ifdef SOFTGRPO_X86
  if (unit == kAvx512Bf16)
    return run<Bf16, Bf16>(a, static_cast<const Bf16*>(a.x), multiply_block_bf16);
#endif
  run<float, Bf16>(a, widened(a), SOFTGRPO_BEST(multiply_block<Bf16>));
}

template <class T>
void pack(T* packed, const T* weight, int64_t columns, int64_t width) {
  constexpr int64_t kPair = sizeof(T) == 2 ? 2 : 1;
  const int64_t padded = (columns + kBlockColumns - 1) / kBlockColumns * kBlockColumns;
#pragma omp parallel for
  for (int64_t tile = 0; tile < padded / kTileColumns; ++tile) {
    T* target = packed + tile * kTileColumns * width;
    for (int64_t k = 0; k < width; k += kPair)
      for (int64_t i = 0; i < kTileColumns; ++i)
        for (int64_t j = 0; j < kPair; ++j) {
          const int64_t column = tile * kTileColumns + i;
          *target++ = column < columns ? weight[column * width + k + j] : T{};
        }
  }
}

}  // namespace

void limit_matrix_unit(int level) { unit_limit = level; }

const char* matrix_unit() {
  const char* const names[] = {"", "avx512_bf16", "amx"};
  return names[bf16_unit()];
}

void pack_linear(void* packed, const void* weight, int64_t columns, int64_t width, bool bf16) {
  if (bf16)
    pack(static_cast<Bf16*>(packed), static_cast<const Bf16*>(weight), columns, width);
  else
    pack(static_cast<float*>(packed), static_cast<const float*>(weight), columns, width);
}

void linear(const Linear& args, bool bf16) {
  if (bf16)
    // A tile of the matrix unit is 32 wide.
    run_bf16(args, args.width % 32 ? std::min<int>(bf16_unit(), kAvx512Bf16) : bf16_unit());
  else
    run<float, float>(args, static_cast<const float*>(args.x),
                      SOFTGRPO_BEST(multiply_block<float>));
}

}  // namespace softgrpo

// One row is one task, so that nothing depends on the batch or on the threads.
#pragma once
#include <cstdint>

namespace softgrpo {

// Below this many elements starting the threads costs more than it saves.
constexpr int64_t kParallelElements = 1 << 15;

template <class Row>
void for_each_row(int64_t rows, int64_t elements_per_row, const Row& row) {
#pragma omp parallel for schedule(static) if (rows * elements_per_row > kParallelElements)
  for (int64_t i = 0; i < rows; ++i) row(i);
}

}  // namespace softgrpo

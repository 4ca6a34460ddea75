// The largest head that the ops on heads take: they keep one on the stack.
#pragma once
#include <cstdint>

namespace softgrpo {

constexpr int64_t kMaxHeadDim = 1024;

}  // namespace softgrpo

// IEEE half precision as 16 bits. (No compiler type: not every target has one.)
#pragma once
#include <cstdint>
#include <cstring>

namespace softgrpo {

struct Half {
  uint16_t bits;
};

// Round to nearest even.
inline Half to_half(float value) {
  uint32_t x;
  std::memcpy(&x, &value, sizeof x);
  const uint32_t sign = (x >> 16) & 0x8000u;
  x &= 0x7FFFFFFFu;
  uint32_t half;
  if (x > 0x7F800000u) {
    half = 0x7E00u;
  } else if (x >= 0x477FF000u) {  // 65520 and above
    half = 0x7C00u;
  } else if (x < 0x38800000u) {  // below 2^-14: the ulp of 0.5 is that of a subnormal half
    std::memcpy(&value, &x, sizeof x);
    value += 0.5f;
    std::memcpy(&x, &value, sizeof x);
    half = x - 0x3F000000u;
  } else {
    half = (x + 0xFFFu + ((x >> 13) & 1u) - 0x38000000u) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace softgrpo

// bfloat16 and float16 storage as float. Functions are static: this header is compiled for several instruction sets,
// and a shared inline copy could be the one made for the widest.
#pragma once

#include <cstdint>
#include <cstring>

namespace paikern {

static inline float bfloat16_to_float(uint16_t raw) {
  const uint32_t word = static_cast<uint32_t>(raw) << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

// Without branches, so that loops over it become vectors: SSE2 has no instruction for it, and the compiler's own
// conversion is a call for every element.
static inline float float16_to_float(uint16_t raw) {
  const uint32_t sign = static_cast<uint32_t>(raw & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(raw & 0x7fffu);
  const uint32_t special = magnitude >= 0x7c00u ? 0x38000000u : 0u;  // infinity and NaN: exponent 31 -> 255
  const uint32_t normal = (magnitude << 13) + 0x38000000u + special;
  const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;  // exact, and normal in float
  uint32_t subnormal;
  std::memcpy(&subnormal, &small, sizeof(subnormal));
  const uint32_t word = sign | (magnitude < 0x0400u ? subnormal : normal);
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

}  // namespace paikern

// Reading float32, bfloat16, float16 and float64 storage as float or double.
#pragma once

#include <cstdint>
#include <cstring>

#include "topk.h"

namespace paikern {

inline float bfloat16_to_float(uint16_t raw) {
  const uint32_t word = static_cast<uint32_t>(raw) << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

inline float float16_to_float(uint16_t raw) {
#if defined(__FLT16_MAX__)
  _Float16 half;
  std::memcpy(&half, &raw, sizeof(half));
  return static_cast<float>(half);
#else
  const uint32_t sign = static_cast<uint32_t>(raw & 0x8000u) << 16;
  const uint32_t exponent = (raw >> 10) & 0x1fu, mantissa = raw & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2**-24 is exact
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const uint32_t word = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (mantissa << 13);
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
#endif
}

// Calls body(read) with read(i) giving element i of `data` as float (double for float64).
template <class Body>
inline void with_reader(const void *data, ScoreType type, Body body) {
  switch (type) {
    case ScoreType::kFloat32:
      return body([p = static_cast<const float *>(data)](int64_t i) { return p[i]; });
    case ScoreType::kBfloat16:
      return body([p = static_cast<const uint16_t *>(data)](int64_t i) { return bfloat16_to_float(p[i]); });
    case ScoreType::kFloat16:
      return body([p = static_cast<const uint16_t *>(data)](int64_t i) { return float16_to_float(p[i]); });
    case ScoreType::kFloat64:
      return body([p = static_cast<const double *>(data)](int64_t i) { return p[i]; });
  }
}

}  // namespace paikern

// Scores as unsigned integers that sort the same way. One definition for every device.
#pragma once

#include <cstdint>
#include <cstring>

namespace paikern {

// Any order of signed floats: -inf < ... < -0 == +0 < ... < +inf.
inline uint32_t ordered_key(float value) {
  value += 0.0f;  // -0 becomes +0
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

inline uint64_t ordered_key(double value) {
  value += 0.0;
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits ^ (static_cast<uint64_t>(static_cast<int64_t>(bits) >> 63) | 0x8000000000000000u);
}

inline float value_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline double value_of(uint64_t key) {
  const uint64_t bits = key & 0x8000000000000000u ? key ^ 0x8000000000000000u : ~key;
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Scores >= 0 of layers with different powers of two: the exponent is added to the bits, which is exact once
// subnormals are normalised. `offset` is (exponent - lowest exponent of all layers) << 23. Below everything: 0, zero:
// 1, infinity: the largest key, whatever its layer.
inline uint64_t scaled_key(float value, int64_t offset) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (bits == 0 || bits == 0x80000000u) return 1;
  if (bits & 0x80000000u) return 0;
  if (bits == 0x7f800000u) return UINT64_MAX;
  int64_t key = bits;
  if (bits < 0x00800000u) {
    const int shift = __builtin_clz(bits) - 8;
    key = (static_cast<int64_t>(1 - shift) * (int64_t{1} << 23)) + ((bits << shift) & 0x7fffffu);
  }
  return static_cast<uint64_t>(key + offset + (int64_t{23} << 23) + 2);
}

inline uint64_t scaled_key(double value, int64_t offset) {  // offset is (exponent difference) << 52
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits << 1) == 0) return 1;
  if (bits >> 63) return 0;
  if (bits == 0x7ff0000000000000u) return UINT64_MAX;
  int64_t key = static_cast<int64_t>(bits);
  if (bits < 0x0010000000000000u) {
    const int shift = __builtin_clzll(bits) - 11;
    key =
        static_cast<int64_t>(1 - shift) * (int64_t{1} << 52) + static_cast<int64_t>((bits << shift) & 0xfffffffffffffu);
  }
  return static_cast<uint64_t>(key + offset + (int64_t{53} << 52) + 2);
}

}  // namespace paikern

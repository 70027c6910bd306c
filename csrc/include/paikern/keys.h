// Scores as unsigned integers that sort the same way. One definition for every device. Integer operations only, so that
// a thread that flushes subnormals to zero (torch.set_flush_denormal) ranks like any other.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "paikern/key_bits.h"

namespace paikern {

inline uint32_t ordered_key(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return ordered_bits(bits);
}

inline uint64_t ordered_key(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (bits == 0x8000000000000000u) bits = 0;
  return bits ^ (static_cast<uint64_t>(static_cast<int64_t>(bits) >> 63) | 0x8000000000000000u);
}

inline float value_of(uint32_t key) {
  const uint32_t bits = bits_of_key(key);
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

// The order of value * 2**shift, see scaled_bits; infinities are the outermost.
inline int64_t scaled_rank(float value, int64_t shift) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return scaled_bits(bits, shift, 1ll << 62);
}

// log2 of the score with a positive rank that is not infinite, shift included.
inline double scaled_log2(int64_t rank) {
  constexpr int64_t kOne = int64_t{1} << 23;
  const int64_t bits = rank - 1, exponent = (bits >= 0 ? bits : bits - kOne + 1) / kOne;
  const double fraction = static_cast<double>(bits - exponent * kOne) / static_cast<double>(kOne);
  return static_cast<double>(exponent - 23 - 127) + std::log2(1.0 + fraction);
}

inline __int128 scaled_rank(double value, int64_t shift) {
  constexpr __int128 kOne = __int128{1} << 52, kInfinity = __int128{1} << 126;
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const bool negative = (bits >> 63) != 0;
  bits &= 0x7fffffffffffffffu;
  __int128 rank = 0;
  if (bits == 0x7ff0000000000000u) {
    rank = kInfinity;
  } else if (bits != 0) {
    rank = static_cast<__int128>(bits);
    if (bits < 0x0010000000000000u) {
      const int up = __builtin_clzll(bits) - 11;
      rank = (1 - up) * kOne + static_cast<__int128>((bits << up) & 0xfffffffffffffu);
    }
    rank += (static_cast<__int128>(shift) + 53) * kOne + 1;
  }
  return negative ? -rank : rank;
}

}  // namespace paikern

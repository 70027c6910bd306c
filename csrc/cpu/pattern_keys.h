// Scores as signed integers that sort the same way, and bits at any position. Functions are static: this header is
// compiled for several instruction sets, and a shared inline copy could be the one made for the widest.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace paikern {

// The order of floats of any width from their storage: the magnitude, negated below zero, so that -0 equals +0.
template <class Key>
struct PatternKeys {
  using Raw = std::make_unsigned_t<Key>;
  static constexpr int kSignShift = static_cast<int>(sizeof(Key)) * 8 - 1;
  static constexpr Raw kMagnitude = static_cast<Raw>(static_cast<Raw>(~Raw{0}) >> 1);

  Raw infinity;
  Key sign;  // 0: magnitudes only

  PatternKeys(bool absolute, bool ieee) : sign(absolute ? 0 : -1) {
    if constexpr (sizeof(Key) == 2) {
      infinity = ieee ? 0x7c00u : 0x7f80u;
    } else if constexpr (sizeof(Key) == 4) {
      infinity = 0x7f800000u;
    } else {
      infinity = 0x7ff0000000000000u;
    }
  }

  Key magnitude(Raw raw) const { return static_cast<Key>(raw & kMagnitude); }

  Key key(Raw raw) const {
    const Key mask = static_cast<Key>(static_cast<Key>(static_cast<Key>(raw) >> kSignShift) & sign);
    return static_cast<Key>((magnitude(raw) ^ mask) - mask);
  }

  bool nan(Raw raw) const { return magnitude(raw) > static_cast<Key>(infinity); }
};

// Sets `count` bits from bit `from` of src at bit `at` of dst, where they are still zero. Both may be touched
// kPatternPad bytes further.
static inline void copy_bits(uint8_t *dst, int64_t at, const uint8_t *src, int64_t from, int64_t count) {
  if (((at | from) & 7) == 0) {
    const int64_t bytes = count >> 3;
    std::memcpy(dst + (at >> 3), src + (from >> 3), static_cast<size_t>(bytes));
    at += 8 * bytes, from += 8 * bytes, count &= 7;
  }
  while (count > 0) {
    const int64_t some = std::min<int64_t>(count, 56);
    uint64_t word, held;
    std::memcpy(&word, src + (from >> 3), 8);
    word = (word >> (from & 7)) & ((uint64_t{1} << some) - 1);
    std::memcpy(&held, dst + (at >> 3), 8);
    held |= word << (at & 7);
    std::memcpy(dst + (at >> 3), &held, 8);
    at += some, from += some, count -= some;
  }
}

}  // namespace paikern

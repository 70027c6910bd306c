// The k-th key by histograms of its digits, 11 bits at a time: what is left when no guess holds. Reads the scores once
// for each digit (three times for float) and needs no memory.
#pragma once

#include "topk_band.h"

namespace paikern {

inline uint32_t radix_key(float key) { return ordered_key(key); }
inline uint64_t radix_key(double key) { return ordered_key(key); }
inline unsigned __int128 radix_key(__int128 key) {
  return static_cast<unsigned __int128>(key) + (static_cast<unsigned __int128>(1) << 127);
}
inline float key_of_radix(uint32_t key) { return value_of(key); }
inline double key_of_radix(uint64_t key) { return value_of(key); }
inline __int128 key_of_radix(unsigned __int128 key) {
  return static_cast<__int128>(key - (static_cast<unsigned __int128>(1) << 127));
}

template <class Value, bool Scaled>
auto radix_kth(const TopkChunks &chunks, int64_t k) {
  using Key = typename TopkKeys<Value, Scaled>::Key;
  using Digits = decltype(radix_key(Key{}));
  constexpr int kBits = static_cast<int>(sizeof(Digits)) * 8, kDigit = 11;  // 2048 counters stay in L1
  Digits prefix = 0;
  int64_t need = k;
  for (int shift = kBits; shift > 0;) {
    const int next = std::max(0, shift - kDigit);
    const size_t last = (size_t{1} << (shift - next)) - 1;
    // One histogram a thread; sums do not depend on their order.
    std::vector<std::vector<int64_t>> counts(static_cast<size_t>(chunks.threads()), std::vector<int64_t>(last + 1, 0));
    chunks.each([&](int64_t c, int thread) {
      const Chunk &chunk = chunks[c];
      auto &mine = counts[static_cast<size_t>(thread)];
      for_tiles<Value>(chunk, [&](const Value *values, int64_t, int64_t n, bool absolute) {
        for (int64_t i = 0; i < n; ++i) {
          const Value value = absolute ? std::fabs(values[i]) : values[i];
          const Digits key = radix_key(TopkKeys<Value, Scaled>::key(value, chunk.shift));
          if (shift == kBits || (key >> (shift % kBits)) == prefix) ++mine[static_cast<size_t>(key >> next) & last];
        }
        return true;
      });
    });
    for (size_t t = 1; t < counts.size(); ++t) {
      for (size_t b = 0; b <= last; ++b) counts[0][b] += counts[t][b];
    }
    size_t bin = last;
    while (bin > 0 && counts[0][bin] < need) need -= counts[0][bin--];
    prefix = static_cast<Digits>((shift == kBits ? Digits{0} : static_cast<Digits>(prefix << (shift - next))) | bin);
    shift = next;
  }
  return key_of_radix(prefix);
}

}  // namespace paikern

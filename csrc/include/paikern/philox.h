// Philox4x32-10, a counter-based generator: four random words of any counter without the ones before it, so that what
// is drawn depends neither on threads nor on the order of the work. Source: Salmon et al., SC 2011.
#pragma once

#include <array>
#include <cstdint>

namespace paikern {

using Words = std::array<uint32_t, 4>;

inline Words philox(Words counter, uint64_t key) {
  uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ low, static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ high, static_cast<uint32_t>(a)};
    low += 0x9E3779B9;
    high += 0xBB67AE85;
  }
  return counter;
}

// A word as a number below n: its upper part, off from uniform by less than n / 2**32.
inline uint32_t below(uint32_t word, uint32_t n) { return static_cast<uint32_t>((uint64_t{word} * n) >> 32); }

}  // namespace paikern

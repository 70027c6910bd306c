// The loops of topk.cpp that run once per score, compiled for each instruction set.
#pragma once

#include <cstdint>

namespace paikern {

struct TopkInner {
  // keys[i] = ordered_key(values[i]), of |values[i]| if absolute; returns whether a value is NaN.
  bool (*keys)(const float *values, int64_t count, bool absolute, uint32_t *keys);

  // Bit i of `above`: keys[i] > high. Bit i of `band`: low <= keys[i] <= high. Whole bytes, count <= 512, spare bits
  // zero. Returns the number of bits in `above`.
  int64_t (*compare)(const uint32_t *keys, int64_t count, uint32_t low, uint32_t high, uint8_t *above, uint8_t *band);
};

extern const TopkInner kTopkPortable, kTopkAvx2, kTopkAvx512;

}  // namespace paikern

// The loops of topk.cpp that run once per score, compiled for each instruction set.
#pragma once

#include <cstdint>

namespace paikern {

struct TopkInner {
  // out[i] = data[i] as float; `half` is bfloat16 or, if `ieee`, float16.
  void (*widen)(const uint16_t *data, int64_t count, bool ieee, float *out);

  // out[i] = (|w[i]| * a[i]) * g, or (w[i]**2 * a[i]) * g if `square`; w may be out.
  void (*factored)(const float *w, const float *a, float g, bool square, int64_t count, float *out);

  // values[i] = -inf where bit i is 0; whole bytes, so `count` may be rounded up to 8 within the buffer.
  void (*exclude)(const uint8_t *candidates, int64_t count, float *values);

  // keys[i] = ordered_key(values[i]), of |values[i]| if absolute; returns whether a value is NaN.
  bool (*keys)(const float *values, int64_t count, bool absolute, uint32_t *keys);

  // Bit i of `above`: keys[i] > high. Bit i of `band`: low <= keys[i] <= high. Whole bytes, count <= 512, spare bits
  // zero. Returns the number of bits in `above`.
  int64_t (*compare)(const uint32_t *keys, int64_t count, uint32_t low, uint32_t high, uint8_t *above, uint8_t *band);
};

extern const TopkInner kTopkPortable, kTopkAvx2, kTopkAvx512;

}  // namespace paikern

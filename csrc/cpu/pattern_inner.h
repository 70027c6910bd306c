// The loops of pattern_nm.cpp and pattern_blocks.cpp that touch every score, compiled for each instruction set.
#pragma once

#include <cstdint>

namespace paikern {

constexpr int64_t kPatternTile = 4096;  // scores of one NmTile at most: raw values, keys and bits stay in L1
constexpr int64_t kPatternNarrow = 16;  // groups up to this size are compared pair by pair, in vectors
constexpr int64_t kPatternPad = 16;     // bytes behind a bit buffer that may be touched

// `slabs` times `width` rows of `run` scores: group (q, s) holds the scores (q, 0, s) ... (q, width - 1, s).
struct NmTile {
  const void *raw;  // score (q, j, s) is raw[(q * width + j) * row + s]
  int64_t slabs, width, run, row;
  int64_t keep;  // of each group
  bool absolute;
  bool ieee;            // 16-bit values are float16 rather than bfloat16
  uint8_t *bits;        // zero where nothing was written yet, kPatternPad more bytes than it needs
  int64_t at, bit_row;  // the bit of (q, j, s) is at + (q * width + j) * bit_row + s
};

struct PatternInner {
  // Sets the bits of the kept; returns whether a score is NaN. width <= kPatternNarrow, at most kPatternTile scores.
  bool (*nm16)(const NmTile &tile);
  bool (*nm32)(const NmTile &tile);
  bool (*nm64)(const NmTile &tile);

  // out[i] = data[i] as float; bfloat16 or, if `ieee`, float16.
  void (*widen)(const uint16_t *data, int64_t count, bool ieee, float *out);

  // out[i] = (|w[i]| * a[i]) * g, or (w[i]**2 * a[i]) * g if `square`; w may be out.
  void (*factored)(const float *w, const float *a, float g, bool square, int64_t count, float *out);

  // sums[i] += values[i], or its magnitude.
  void (*add32)(const float *values, int64_t count, bool absolute, double *sums);
  void (*add64)(const double *values, int64_t count, bool absolute, double *sums);

  // The same with eight sums a block: value i of a block goes to sum i % 8. count = blocks * wide, wide >= 8.
  void (*add_blocks32)(const float *values, int64_t count, int64_t wide, bool absolute, double *sums);
  void (*add_blocks64)(const double *values, int64_t count, int64_t wide, bool absolute, double *sums);
};

extern const PatternInner kPatternPortable, kPatternAvx2, kPatternAvx512;

}  // namespace paikern

// Exact selection of the k largest scores over many tensors, as one bit a weight.
#pragma once

#include <cstdint>
#include <vector>

namespace paikern {

enum class ScoreType : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Scores of one tensor. Dense: `data` holds numel values. Factored (a != null): data holds the weight [rows, columns]
// and the score is ((|w|**power) * a[i]) * g[o]. Bits of `candidates` that are 0 rank below everything.
struct ScoreSource {
  const void *data;
  ScoreType type;
  int64_t numel;
  bool absolute;
  int64_t exponent;  // values count as value * 2**exponent; then they must be >= 0 or "below everything"
  const float *a;
  const float *g;
  int64_t columns;
  int power;
  const uint8_t *candidates;
  uint8_t *bits;  // ceil(numel / 8) bytes, written whole
};

// One ranking: keep k of sources[first .. last).
struct Ranking {
  int64_t first, last, k;
};

// Fills the bits of all sources. Returns the index of the first source that holds NaN, else -1 (bits mean nothing
// then). Order: score descending, then source index, then position ascending; -0 equals +0; infinities by value.
int64_t topk_mask(const std::vector<ScoreSource> &sources, const std::vector<Ranking> &rankings);

// The k-th largest value (1-based, k <= total), exponents must be 0. `nan` receives the index as above.
double kth_largest(const std::vector<ScoreSource> &sources, int64_t k, int64_t *nan);

}  // namespace paikern

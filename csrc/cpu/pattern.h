// Structured masks: N:M groups, and scores and bits of rectangular blocks (rows, columns and kernels are blocks too).
#pragma once

#include <cstdint>
#include <vector>

namespace paikern {

enum class PatternType : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// The scores of one tensor in row-major order of `sizes`, read in place whatever `strides` (in elements) are.
// Dense: the values, or their magnitudes. Factored (a != null): data holds a weight [rows, columns] and the score is
// ((|w|**power) * a[column]) * g[row] in float32, -1 where the bit of `candidates` is 0.
struct PatternScores {
  const void *data;
  PatternType type;
  std::vector<int64_t> sizes, strides;
  bool absolute;
  const float *a;
  const float *g;
  int64_t columns;
  int power;
  const uint8_t *candidates;

  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    return count;
  }
};

// The tensor is [outer, axis, inner] in row-major order; groups run along `axis`.
struct NmSource {
  PatternScores scores;
  int64_t axis, inner;
  uint8_t *bits;  // ceil(numel / 8) bytes, written whole
};

// Of every m consecutive scores along the axis the bits of the n largest, of r < m left over those of the
// ceil(r * n / m) largest; ties to the lower index, -0 equals +0. 1 <= n <= m. Returns the index of the first source
// that holds NaN, else -1 (bits mean nothing then).
int64_t nm_mask(const std::vector<NmSource> &sources, int64_t n, int64_t m);

// Of the matrix [numel / columns, columns], cut into blocks of `high` rows and `wide` columns from its first element,
// smaller at its far edges: the mean score of each block, row-major. Sums are float64, in an order of their own: lane
// j of eight adds the elements whose position in their line of the block is j modulo 8, line after line, and the lanes
// are added from the first to the last. Returns whether a mean is NaN.
bool block_means(const PatternScores &scores, int64_t columns, int64_t high, int64_t wide, double *means);

// A bit for each block -> a bit for each element of the matrix [rows, columns].
void expand_blocks(const uint8_t *blocks, int64_t rows, int64_t columns, int64_t high, int64_t wide, uint8_t *bits);

}  // namespace paikern

// The adjoint of a linear layer and the selection among its scores, in one read of the weight.
#pragma once

#include <cmath>
#include <limits>

#include "path_kernels.h"

namespace paikern {

// A weight [rows, columns] between two vectors. Weight (i, j) scores (V[i, j] * a[j]) * g[i] in float, in this order:
// the same bits as a factored ScoreSource. Pruned weights have no score.
struct SweepLayer {
  WeightView w;
  int64_t rows, columns;
  const float *a;  // [columns]
  const float *g;  // [rows]
};

// A score above `high` gets its bit. One that is neither above `high` nor below `low` is a candidate, and so is NaN.
struct SweepBand {
  float low, high;
};

// The largest float that is at most `bound`, and the smallest that is at least that: a score is above the bound where
// it is above the one, and not below it where it is not below the other.
inline float rounded_down(double bound) {
  constexpr float kMost = std::numeric_limits<float>::max();
  if (bound > kMost) return std::isinf(bound) ? static_cast<float>(bound) : kMost;
  if (bound < -kMost) return -std::numeric_limits<float>::infinity();
  const float near = static_cast<float>(bound);
  return static_cast<double>(near) > bound ? std::nextafter(near, -kMost) : near;
}
inline float rounded_up(double bound) { return -rounded_down(-bound); }

class SweepSink {
 public:
  virtual ~SweepSink() = default;
  // Candidates and their positions in the weight, in no fixed order. Called from several threads.
  virtual void take(const float *scores, const int64_t *positions, int64_t count) = 0;
};

// x [columns] = V^T g, the same bits as path_backward, or nothing where x is null; `bits`, ceil(rows * columns / 8)
// bytes, written whole; returns how many bits are set. Subnormal numbers count.
int64_t path_sweep(const SweepLayer &layer, const SweepBand &band, uint8_t *bits, float *x, SweepSink &sink);

// What follows is between path_sweep.cpp and the kernel.

constexpr int64_t kSweepColumns = 4096;  // a pass: 16 KB of partial sums and of `a`; with 2048, 22 ms instead of 21
constexpr int64_t kSweepRows = 4;

// Rows row .. row + rows (kSweepRows or 1), columns j0 .. j1 (kSweepColumns at most).
struct SweepRows {
  const SweepLayer *layer;
  SweepBand band;
  int64_t row, rows, j0, j1;
  float *sums;  // sums[j - j0] += V[i, j] g[i] for the rows in order; room for whole vectors
};

struct SweepFound {
  static constexpr int64_t kRoom = 2 * kSweepRows * kSweepColumns, kSlack = 8;

  uint64_t above[kSweepRows][kSweepColumns / 64];  // bit j - j0 of a row
  float *scores;                                   // candidates; kRoom and kSlack of each
  int64_t *positions;
  int64_t count;
  int64_t set;  // bits of `above`, summed over passes
};

}  // namespace paikern

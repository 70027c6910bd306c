// A random mask with given row sums whose columns are as even as they can be.
#pragma once

#include <cstdint>

namespace paikern {

// A weight as `groups` matrices of kernels, inputs x outputs each, `positions` weights a kernel. Stored
// [groups * outputs, inputs, positions], or [groups * inputs, outputs, positions] if transposed.
struct KernelGrid {
  int64_t groups, inputs, outputs, positions;
  bool transposed;

  int64_t kernels() const { return groups * inputs * outputs; }
};

// Of the outputs * positions weights of row i (group-major, groups * inputs of them) exactly rows[i] are kept:
// rows[i] / outputs in every kernel of the row and one more in rows[i] % outputs of them, chosen such that the column
// sums of a group differ by at most 1. Which, and which positions in a kernel, is drawn by Philox from `seed` and
// `stream`, whatever the threads. With cover >= 0 columns are even up to that many weights only, and what goes beyond
// is given to the same few of them. With `scores` (float, or double if `wide`, in stored order) a kernel keeps the
// positions of the largest magnitudes, the lower on ties. Writes ceil(numel / 8) bytes. False if a score is NaN.
bool balanced_mask(const int64_t *rows, const KernelGrid &grid, int64_t cover, uint64_t seed, uint32_t stream,
                   const void *scores, bool wide, uint8_t *bits);

}  // namespace paikern

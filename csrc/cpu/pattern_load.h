// Scores of a tensor of any strides and type as contiguous runs of its row-major order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pattern.h"
#include "pattern_inner.h"

namespace paikern {

const PatternInner &pattern_inner();

class ScoreReader {
 public:
  explicit ScoreReader(const PatternScores &scores);

  // Type of what `read` returns: that of the storage, float32 if factored.
  PatternType type() const { return factored_ ? PatternType::kFloat32 : s_->type; }

  int64_t itemsize() const { return factored_ ? 4 : itemsize_; }

  // Whether scores are read where they lie, one after the other.
  bool direct() const { return axes_.empty() && !factored_; }

  // Whether the scores are a matrix of so many columns, which, not its rows, lie side by side, as in the view W.T.
  bool crosswise(int64_t columns) const {
    return !factored_ && axes_.size() == 2 && axes_[1].size == columns && axes_[0].stride == 1 &&
           axes_[1].stride >= axes_[0].size;
  }

  // Of such a matrix the part [rows, columns] that begins at (row, column), in row-major order.
  void read_across(int64_t row, int64_t rows, int64_t column, int64_t columns, void *buffer) const;

  // Scores start .. start + count, in the storage itself where they lie there side by side, else in `buffer`, which has
  // room for `count` values. `absolute` is left to the caller.
  const void *read(int64_t start, int64_t count, void *buffer) const;

  // The same as float, or as double if the type is float64.
  const void *read_wide(int64_t start, int64_t count, void *buffer) const;

 private:
  static constexpr size_t kMostAxes = 64;  // PyTorch's own limit

  struct Axis {
    int64_t size, stride;
  };

  const void *stored(int64_t start, int64_t count, void *buffer) const;
  void factor(int64_t start, int64_t count, float *values) const;

  const PatternScores *s_;
  bool factored_;
  int64_t itemsize_;
  std::vector<Axis> axes_;  // as few as give the same order, outermost first; none: contiguous
  const PatternInner &inner_ = pattern_inner();
};

// Bits from `first` onwards, written to a buffer and put in their place at the end. Spans of neighbouring chunks may
// share a byte, which each then joins in one atomic step; such bytes must be zero before.
class BitSpan {
 public:
  BitSpan(uint8_t *bits, int64_t first, int64_t count);

  uint8_t *buffer() { return held_; }
  int64_t at(int64_t bit) const { return bit - (first_ & ~int64_t{7}); }
  void store() const;

  // Zeroes the bytes that the span may share.
  static void clear_ends(uint8_t *bits, int64_t first, int64_t count);

 private:
  static constexpr int64_t kSmall = 8192 + 1;

  uint8_t *bits_;
  int64_t first_, count_;
  uint8_t small_[kSmall + kPatternPad];
  std::vector<uint8_t> large_;
  uint8_t *held_;
};

}  // namespace paikern

// The weights of a convolution that are left, side by side: what the sweeps over a thinned network read.
//
// One list a row of V, six bytes a weight: |w|**p and its column. Both sweeps and the scores then cost what is kept,
// with no mask to look through and no pruned weight to skip: a 3 x 3 x 512 x 512 layer over 2 x 2 positions at density
// 0.05 takes 0.36 ms forwards when its 9.4 MB are read and 0.07 ms from lists (two threads). Maps lie as in
// path_plan.h, so that a weight is one shifted plane; over few positions (path_few.h) they are columns. Every sum is
// made in the order in which the plan for all weights makes it, but scores over many positions in that of the kept plan
// of path_outer.h: the same bits as without lists.
#pragma once

#include <functional>
#include <vector>

#include "path_plan.h"

namespace paikern {

class CompactLayer {
 public:
  // Whether lists are made for a layer of this density: they can be, and are faster than a read of everything.
  static bool pays(const PathGeometry &geometry, const WeightView &w, double density);

  // Bytes of the lists of `kept` weights.
  static int64_t bytes(int64_t kept) { return kept * static_cast<int64_t>(sizeof(float) + sizeof(uint16_t)); }

  // Of the weights that the view keeps.
  CompactLayer(const PathGeometry &geometry, const WeightView &w);

  // Drops the weights whose bit is 0.
  void filter(const uint8_t *mask);

  int64_t kept() const { return kept_; }
  int64_t bytes() const { return bytes(static_cast<int64_t>(columns_.size())); }

  void forward(const float *x, float *z) const;
  void backward(const float *g, float *gx) const;

  // The scores of one row: `count` weights, in ascending columns.
  using Sink = std::function<void(int64_t row, const uint16_t *columns, const float *scores, int64_t count)>;
  // Calls `sink` once for each row that has weights, from several threads; a thread takes eight rows at a time, so that
  // no two write the same byte of a mask.
  void scores(const float *x, const float *g, const Sink &sink) const;

 private:
  int64_t count(int64_t row) const { return counts_[static_cast<size_t>(row)]; }
  const uint16_t *columns(int64_t row) const { return columns_.data() + starts_[static_cast<size_t>(row)]; }
  const float *values(int64_t row) const { return values_.data() + starts_[static_cast<size_t>(row)]; }
  struct Part {
    const uint16_t *columns;
    const float *values;
    int64_t count;
  };
  int64_t few_width() const { return round_up(geometry_.batch * geometry_.out_pixels(), 4); }
  Part columns_of(int64_t row, int64_t c0, int64_t c1) const;
  void fill_columns(const float *x, float *map) const;
  void forward_columns(const float *x, float *z) const;
  void fill_rows(const float *g, float *to) const;
  void backward_columns(int64_t c0, int64_t c1, const float *g, float *gx) const;
  void backward_planes(int64_t c0, int64_t c1, const float *g_planes, float *gx) const;
  bool parallel() const { return kept_ * (length_ / 16 + 1) > parallel_work() / 16; }
  void close_up();

  PathGeometry geometry_;
  ForwardPlan plan_;
  bool few_;
  int64_t kept_ = 0, length_ = 0, plane_stride_ = 0;
  std::vector<int32_t> offsets_;  // where the plane of a column starts
  std::vector<int32_t> pixels_;   // [taps][positions], see pixel_table
  std::vector<int64_t> starts_, counts_;
  std::vector<uint16_t> columns_;
  std::vector<float> values_;
};

}  // namespace paikern

// The scores of path_score, made a piece at a time where a selection wants them.
#pragma once

#include "path_outer.h"
#include "topk.h"

namespace paikern {

class PathScoreTiles final : public ScoreTiles {
 public:
  // What the views point at must outlive this. Weights whose mask bit is 0 score -infinity.
  PathScoreTiles(const PathGeometry &geometry, const WeightView &w, const float *x, const float *g)
      : geometry_(geometry), w_(w), maps_(geometry_, x, g), tiles_(geometry_, maps_) {}
  PathScoreTiles(const PathScoreTiles &) = delete;
  PathScoreTiles &operator=(const PathScoreTiles &) = delete;

  void fill(int64_t start, int64_t count, float *out) const override;
  void sample(int64_t start, int64_t count, float *out) const override;

 private:
  const PathGeometry geometry_;
  const WeightView w_;
  const OuterMaps maps_;
  const OuterTiles tiles_;
};

}  // namespace paikern

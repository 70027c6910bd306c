// The scores of path_score, made a piece at a time where a selection wants them.
#pragma once

#include "path_outer.h"
#include "topk.h"

namespace paikern {

// Scores of the kept weights alone, for maps that are kept_only(); the memory of one thread.
class KeptScores {
 public:
  KeptScores(const PathGeometry &geometry, const OuterMaps &maps, const WeightView &w);

  // Columns j0 .. j0 + count of one row; `pruned` where the mask bit is 0.
  void run(int64_t row, int64_t j0, int64_t count, float pruned, float *out) const;

 private:
  static constexpr int64_t kColumns = 4096;

  const PathGeometry &geometry_;
  const OuterMaps &maps_;
  const WeightView &w_;
  const Scratch<int32_t> offsets_;
  const FloatBuffer values_, q_;
};

class PathScoreTiles final : public ScoreTiles {
 public:
  // What the views point at must outlive this. Weights whose mask bit is 0 score -infinity.
  PathScoreTiles(const PathGeometry &geometry, const WeightView &w, const float *x, const float *g)
      : geometry_(geometry), w_(w), maps_(geometry_, x, g, &w_), tiles_(geometry_, maps_) {}
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

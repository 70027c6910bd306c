// score[o, j] = |W|**p * (g x^T), the score of every weight of a path method: one write of N floats, one read of W.
#include "path_score_tiles.h"

namespace paikern {

void path_score(const PathGeometry &geometry, const WeightView &w, const float *x, const float *g, float pruned,
                float *score) {
  const OuterMaps maps(geometry, x, g, &w);
  const int64_t columns = geometry.depth();
  if (maps.kept_only()) {
    const bool parallel = geometry.rows * columns * (maps.positions() / 64 + 1) > parallel_work();
#pragma omp parallel if (parallel && geometry.rows > 1)
    {
      const KeptScores kept(geometry, maps, w);
#pragma omp for schedule(dynamic)
      for (int64_t row = 0; row < geometry.rows; ++row) {
        kept.run(row, 0, columns, pruned, score + row * columns);
      }
    }
    return;
  }
  const PathKernels &kernels = path_kernels();
  for_outer_tiles(geometry, maps,
                  [&](int64_t row, int64_t rows, int64_t j0, int64_t count, const float *q, int64_t ld) {
                    for (int64_t r = 0; r < rows; ++r) {
                      const int64_t start = (row + r) * columns + j0;
                      kernels.score(w, start, count, q + r * ld, pruned, score + start);
                    }
                  });
}

}  // namespace paikern

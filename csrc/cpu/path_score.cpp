// score[o, j] = |W|**p * (g x^T), the score of every weight of a path method: one write of N
// floats, one read of W.
#include "path_outer.h"

namespace paikern {

void path_score(const PathGeometry &geometry, const WeightView &w, const float *x, const float *g, float pruned,
                float *score) {
  const PathKernels &kernels = path_kernels();
  const int64_t columns = geometry.depth();
  for_outer_tiles(geometry, x, g,
                  [&](int64_t row, int64_t rows, int64_t j0, int64_t count, const float *q, int64_t ld) {
                    for (int64_t r = 0; r < rows; ++r) {
                      const int64_t start = (row + r) * columns + j0;
                      kernels.score(w, start, count, q + r * ld, pruned, score + start);
                    }
                  });
}

}  // namespace paikern

// Q = G X^T tile by tile: row strips of the weight times whole kernels of columns, handed over while they are in L2.
//
// Q is never stored. The columns of X are transposed once a task (in 16 x 16 register blocks); a strip of G meets them
// in the same tile multiply as the forward pass. Sums run over positions in ascending order, so a value does not depend
// on the tile or the thread that made it.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "path_plan.h"

namespace paikern {

// The two maps, laid out for tile products over positions.
class OuterMaps {
 public:
  OuterMaps(const PathGeometry &geometry, const float *x, const float *g);

  int64_t positions() const { return positions_; }
  bool depth_major() const { return linear_; }

  // rows r0 .. r0 + rows of G for positions q0 .. q0 + depth, as panels for `multiply`
  void pack_rows(int64_t group, int64_t r0, int64_t rows, int64_t q0, int64_t depth, float *a) const;

  // columns j0 .. j0 + count of X for the same positions
  void pack_columns(int64_t group, int64_t j0, int64_t count, int64_t q0, int64_t depth, float *b) const;

 private:
  const PathGeometry &geometry_;
  const float *g_;
  bool linear_;
  int64_t positions_, x_group_ = 0, span_ = 0, lead_ = 0, ld_ = 0;
  std::vector<int64_t> offsets_;  // of each column j of group 0
  FloatBuffer x_planes_, g_planes_;
};

// Calls sink(row, rows, j0, count, q, ld) for every tile; `row` counts over all groups, count is a multiple of the
// kernel. Called from several threads at once, each tile once.
template <class Sink>
void for_outer_tiles(const PathGeometry &geometry, const float *x, const float *g, Sink sink) {
  constexpr int64_t kPositions = 2048, kPanelFloats = 1 << 17, kTileFloats = 1 << 16;
  const PathKernels &kernels = path_kernels();
  const OuterMaps maps(geometry, x, g);
  const int64_t rows = geometry.group_rows(), columns = geometry.depth(), taps = geometry.taps();
  const int64_t positions = maps.positions(), chunk = std::min(positions, kPositions);
  const bool parallel = geometry.rows * columns * (positions / 8 + 1) > kParallelWork;
  const int64_t threads = parallel ? omp_get_max_threads() : 1;

  int64_t width = std::clamp<int64_t>(kPanelFloats / chunk, 64, 4096) / taps * taps;
  width = std::min(std::max(width, taps), columns);
  const int64_t blocks = divide_up(columns, width);
  width = divide_up(divide_up(columns, blocks), taps) * taps;
  const int64_t ld = round_up(width, kernels.tile_columns);
  const int64_t strip =
      positions > kPositions ? 256 : round_up(std::clamp<int64_t>(kTileFloats / ld, 1, 256), kernels.tile_rows);
  int64_t range = round_up(rows, kernels.tile_rows);
  while (geometry.groups * blocks * divide_up(rows, range) < 2 * threads && range > 2 * kernels.tile_rows) {
    range = round_up(range / 2, kernels.tile_rows);
  }
  const int64_t ranges = divide_up(rows, range), tasks = geometry.groups * blocks * ranges;
#pragma omp parallel if (parallel && tasks > 1)
  {
    const int64_t tile_rows = std::min(strip, range);
    const FloatBuffer a(tile_rows * kDepth), c(tile_rows * ld + 64);
    const FloatBuffer b(ld * round_up(chunk, kDepth));
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t first = task % ranges * range, j0 = task / ranges % blocks * width;
      const int64_t group = task / ranges / blocks;
      const int64_t last = std::min(rows, first + range), count = std::min(width, columns - j0);
      const int64_t lanes = round_up(count, kernels.lanes);
      for (int64_t r0 = first; r0 < last; r0 += tile_rows) {
        const int64_t strip_rows = std::min(tile_rows, last - r0), panels = divide_up(strip_rows, kernels.tile_rows);
        for (int64_t q0 = 0; q0 < positions; q0 += chunk) {
          const int64_t q1 = std::min(positions, q0 + chunk);
          for (int64_t q = q0; q < q1; q += kDepth) {
            const int64_t depth = std::min(kDepth, q1 - q);
            float *panel = b.get() + (q - q0) * ld;
            if (r0 == first || positions > chunk) maps.pack_columns(group, j0, count, q, depth, panel);
            maps.pack_rows(group, r0, strip_rows, q, depth, a.get());
            kernels.multiply(a.get(), maps.depth_major(), panels, panel, lanes, depth, c.get(), ld, q > 0);
          }
        }
        sink(group * rows + r0, strip_rows, j0, count, c.get(), ld);
      }
    }
  }
}

}  // namespace paikern

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

  // Q[row, column], summed in another order than tiles are: for guesses.
  float nearly(int64_t row, int64_t column) const;

 private:
  const PathGeometry &geometry_;
  const float *g_;
  bool linear_;
  int64_t positions_, x_group_ = 0, span_ = 0, lead_ = 0, ld_ = 0;
  std::vector<int64_t> offsets_;  // of each column j of group 0
  FloatBuffer x_planes_, g_planes_;
};

// How the tiles of one geometry are cut, and the memory of one thread for them.
class OuterTiles {
 public:
  static constexpr int64_t kPositions = 2048, kPanelFloats = 1 << 17, kTileFloats = 1 << 16;

  OuterTiles(const PathGeometry &geometry, const OuterMaps &maps)
      : kernels(path_kernels()), geometry_(geometry), maps_(maps) {
    const int64_t columns = geometry.depth(), taps = geometry.taps();
    chunk_ = std::min(maps.positions(), kPositions);
    width = std::clamp<int64_t>(kPanelFloats / chunk_, 64, 4096) / taps * taps;
    width = std::min(std::max(width, taps), columns);
    width = divide_up(divide_up(columns, blocks()), taps) * taps;
    ld_ = round_up(width, kernels.tile_columns);
    strip_ = maps.positions() > kPositions
                 ? 256
                 : round_up(std::clamp<int64_t>(kTileFloats / ld_, 1, 256), kernels.tile_rows);
  }

  int64_t blocks() const { return divide_up(geometry_.depth(), width); }

  struct Memory {
    FloatBuffer a, b, c;
  };
  Memory memory(int64_t rows) const {
    const int64_t tile_rows = std::min(strip_, rows);
    return {FloatBuffer(tile_rows * kDepth), FloatBuffer(ld_ * round_up(chunk_, kDepth)),
            FloatBuffer(tile_rows * ld_ + 64)};
  }

  // Rows first .. last of a group, columns j0 .. j0 + count (a whole number of kernels, at most `width`); `memory` is
  // made for at least as many rows.
  template <class Sink>
  void run(int64_t group, int64_t first, int64_t last, int64_t j0, int64_t count, const Memory &memory,
           Sink sink) const {
    const int64_t positions = maps_.positions(), lanes = round_up(count, kernels.lanes);
    const int64_t tile_rows = std::min(strip_, round_up(last - first, kernels.tile_rows));
    for (int64_t r0 = first; r0 < last; r0 += tile_rows) {
      const int64_t strip_rows = std::min(tile_rows, last - r0), panels = divide_up(strip_rows, kernels.tile_rows);
      for (int64_t q0 = 0; q0 < positions; q0 += chunk_) {
        const int64_t q1 = std::min(positions, q0 + chunk_);
        for (int64_t q = q0; q < q1; q += kDepth) {
          const int64_t depth = std::min(kDepth, q1 - q);
          float *panel = memory.b.get() + (q - q0) * ld_;
          if (r0 == first || positions > chunk_) maps_.pack_columns(group, j0, count, q, depth, panel);
          maps_.pack_rows(group, r0, strip_rows, q, depth, memory.a.get());
          kernels.multiply(memory.a.get(), maps_.depth_major(), panels, panel, lanes, depth, memory.c.get(), ld_,
                           q > 0);
        }
      }
      sink(group * geometry_.group_rows() + r0, strip_rows, j0, count, memory.c.get(), ld_);
    }
  }

  const PathKernels &kernels;
  int64_t width;  // columns of a block

 private:
  const PathGeometry &geometry_;
  const OuterMaps &maps_;
  int64_t chunk_, ld_, strip_;
};

// Calls sink(row, rows, j0, count, q, ld) for every tile; `row` counts over all groups, count is a multiple of the
// kernel. Called from several threads at once, each tile once.
template <class Sink>
void for_outer_tiles(const PathGeometry &geometry, const float *x, const float *g, Sink sink) {
  const OuterMaps maps(geometry, x, g);
  const OuterTiles tiles(geometry, maps);
  const int64_t rows = geometry.group_rows(), columns = geometry.depth(), panel = tiles.kernels.tile_rows;
  const bool parallel = geometry.rows * columns * (maps.positions() / 8 + 1) > kParallelWork;
  const int64_t threads = parallel ? omp_get_max_threads() : 1, blocks = tiles.blocks();
  int64_t range = round_up(rows, panel);
  while (geometry.groups * blocks * divide_up(rows, range) < 2 * threads && range > 2 * panel) {
    range = round_up(range / 2, panel);
  }
  const int64_t ranges = divide_up(rows, range), tasks = geometry.groups * blocks * ranges;
#pragma omp parallel if (parallel && tasks > 1)
  {
    const OuterTiles::Memory memory = tiles.memory(range);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t first = task % ranges * range, j0 = task / ranges % blocks * tiles.width;
      tiles.run(task / ranges / blocks, first, std::min(rows, first + range), j0, std::min(tiles.width, columns - j0),
                memory, sink);
    }
  }
}

}  // namespace paikern

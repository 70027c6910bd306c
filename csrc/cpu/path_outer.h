// Q = G X^T tile by tile: row strips of the weight times whole kernels of columns, handed over while they are in L2.
//
// Q is never stored. Four plans, chosen by the geometry and, for scores, by the density of the mask:
//   blocks   X is transposed once to [channel block][position][lanes]; every tap is the same block shifted, so nothing
//            is packed for a tile, and positions between the rows are skipped
//   columns  the same with a lane for every column (channel and tap): more to transpose, but sums come out in order
//   dots     rows of G times planes of X along the positions: few channels a group (depthwise, images)
//   kept     the same dots for kept weights alone; a weight costs twice what it does in a tile
// G is read where it lies but for dots. Each value is summed in an order that does not depend on the tile or the thread
// that made it.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "path_plan.h"

namespace paikern {

// The two maps, laid out for products over positions.
class OuterMaps {
 public:
  // With `kept`, the weights whose mask bit is 0 are not asked for. x and g must outlive this.
  OuterMaps(const PathGeometry &geometry, const float *x, const float *g, const WeightView *kept = nullptr);

  int64_t positions() const { return geometry_.batch * geometry_.out_pixels(); }
  bool by_dots() const { return plan_ == Plan::kDots || plan_ == Plan::kKept; }
  bool kept_only() const { return plan_ == Plan::kKept; }

  // Not by dots: vectors of channels, each shifted for every tap, or vectors of columns, and then taps() is 1.
  int64_t taps() const { return static_cast<int64_t>(shifts_.size()); }
  const float *block(int64_t group, int64_t index, int64_t tap) const {
    return blocks_.get() + (group * group_blocks_ + index) * block_stride_ +
           shifts_[static_cast<size_t>(tap)] * path_kernels().lanes;
  }
  const std::vector<OuterRun> &runs() const { return runs_; }

  // Row `row` of G at the positions of runs(); rows up to row_end(), whole panels, can be read.
  const float *rows(int64_t row) const { return rows_ + row * row_step_; }
  int64_t row_end() const { return row_end_; }
  int64_t row_step() const { return row_step_; }
  int64_t position_step() const { return position_step_; }

  // By dots, planes: column j of a group starts at offsets()[j], and what lies between its rows meets zeros of G.
  const float *x_plane(int64_t group) const { return x_planes_.get() + lead_ + group * x_group_; }
  const float *g_plane(int64_t row) const { return g_planes_.get() + lead_ + row * span_; }
  const int32_t *offsets() const { return offsets_.data(); }
  int64_t span() const { return span_; }
  int64_t length() const { return length_; }

  // Q[row, column], summed in another order than tiles are: for guesses.
  float nearly(int64_t row, int64_t column) const;

 private:
  enum class Plan { kLinear, kBlocks, kColumns, kDots, kKept };

  Plan choose(const WeightView *kept) const;
  void lay_out_linear();
  void make_planes(const ForwardPlan &plan);
  void make_blocks(const ForwardPlan &plan);
  void make_columns(const ForwardPlan &plan);
  void make_rows();
  void pack_plane(const Lattice &lattice, const Grid &grid, int64_t channel, int64_t count, float *block) const;

  const PathGeometry &geometry_;
  const float *x_, *g_;
  Plan plan_ = Plan::kLinear;
  int64_t lead_ = 0, span_ = 0, length_ = 0, x_group_ = 0;
  int64_t row_step_ = 1, row_end_ = 0, position_step_ = 1, group_blocks_ = 0, block_stride_ = 0;
  const float *rows_ = nullptr;
  std::vector<int64_t> shifts_;   // of each tap
  std::vector<int32_t> offsets_;  // of each column of a group
  std::vector<OuterRun> runs_;
  FloatBuffer x_planes_, g_planes_, g_rows_, blocks_;
};

// How the tiles of one geometry are cut, and the memory of one thread for them.
class OuterTiles {
 public:
  static constexpr int64_t kTileFloats = 1 << 16, kTileColumns = 2048;

  OuterTiles(const PathGeometry &geometry, const OuterMaps &maps);

  int64_t blocks() const { return divide_up(geometry_.depth(), width); }

  struct Memory {
    FloatBuffer sums, q;
  };
  Memory memory(int64_t rows) const;

  // Rows first .. last of a group, columns j0 .. j0 + count (whole vectors of channels unless they are the last ones,
  // at most `width`); `memory` is made for at least as many rows.
  template <class Sink>
  void run(int64_t group, int64_t first, int64_t last, int64_t j0, int64_t count, const Memory &memory,
           Sink sink) const {
    const int64_t tile_rows = std::min(strip_, round_up(last - first, kernels.tile_rows));
    for (int64_t r0 = first; r0 < last; r0 += tile_rows) {
      const int64_t rows = std::min(tile_rows, last - r0), row = group * geometry_.group_rows() + r0;
      const float *q = memory.q.get();
      if (maps_.by_dots()) {
        kernels.dots(maps_.g_plane(row), maps_.span(), rows, maps_.x_plane(group), maps_.offsets() + j0, count,
                     maps_.length(), memory.q.get(), ld_);
      } else {
        q = multiply(group, row, rows, j0, count, memory);
      }
      sink(row, rows, j0, count, q, ld_);
    }
  }

  const PathKernels &kernels;
  int64_t width;  // columns of a block
  int64_t unit;   // columns that are made together

 private:
  const float *multiply(int64_t group, int64_t row, int64_t rows, int64_t j0, int64_t count,
                        const Memory &memory) const;

  const PathGeometry &geometry_;
  const OuterMaps &maps_;
  int64_t ld_, strip_;
};

// Calls sink(row, rows, j0, count, q, ld) for every tile; `row` counts over all groups, count is a multiple of the
// kernel. Called from several threads at once, each tile once.
template <class Sink>
void for_outer_tiles(const PathGeometry &geometry, const OuterMaps &maps, Sink sink) {
  const OuterTiles tiles(geometry, maps);
  const int64_t rows = geometry.group_rows(), columns = geometry.depth(), panel = tiles.kernels.tile_rows;
  const bool parallel = geometry.rows * columns * (maps.positions() / 8 + 1) > parallel_work();
  const int64_t threads = parallel ? omp_get_max_threads() : 1, blocks = tiles.blocks();
  int64_t range = round_up(rows, panel);
  while (geometry.groups * blocks * divide_up(rows, range) < 2 * threads && range > panel) {
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

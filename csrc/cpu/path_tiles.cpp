// The dense plan: panels of V, at most 128 x 192 and decoded as they are needed, against packed columns.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "path_product.h"

namespace paikern {
namespace {

// The adjoint of a kernel of 1 reads `rows` weights side by side of each row of V: 256 make whole kilobytes.
constexpr int64_t kRowBlock = 128, kWideRowBlock = 256, kColumnBlock = 480;

// So few panels read the planes where they lie: packing the columns of ResNet-20's first stage (two panels) took a
// tenth of its rounds.
constexpr int64_t kPlanePanels = 4;

// Rows r0 .. r0 + rows of V for k0 .. k0 + depth, as panels [panel][row][kDepth]; missing rows are 0.
void pack_forward(const Product &p, const PathKernels &kernels, int64_t group, int64_t r0, int64_t rows, int64_t k0,
                  int64_t depth, float *a) {
  for (int64_t r = 0; r < round_up(rows, kernels.tile_rows); ++r, a += kDepth) {
    if (r >= rows) {
      std::memset(a, 0, sizeof(float) * kDepth);
      continue;
    }
    const int64_t start = (group * p.rows + r0 + r) * p.depth() + k0;
    prefetch_weights(p.weights, start + kDepth, std::min(kDepth, p.depth() - k0 - depth));
    kernels.decode(p.weights, start, depth, a);
  }
}

// Column r of a line of `stride` weights a column -> row r of the panels, one reduction index.
template <int Panel>
void scatter_line(const float *source, int64_t stride, int64_t rows, float *target) {
  int64_t r = 0;
  for (; r + Panel <= rows; r += Panel, target += Panel * kDepth) {
    for (int i = 0; i < Panel; ++i) target[i] = source[(r + i) * stride];
  }
  for (int i = 0; r + i < rows; ++i) target[i] = source[(r + i) * stride];
}

// The same for the adjoint: row r is a column channel, k runs over (row of V, tap); panels [panel][kDepth][row].
void pack_backward(const Product &p, const PathKernels &kernels, int64_t group, int64_t c0, int64_t rows, int64_t k0,
                   int64_t depth, float *line, float *a) {
  constexpr int64_t kAhead = 8;  // rows of V
  const int64_t all = p.geometry.taps(), count = p.tap_count(), width = p.geometry.depth();
  const int64_t panel = kernels.tile_rows, panels = divide_up(rows, panel);
  if (rows % panel) {
    std::memset(a + (panels - 1) * panel * kDepth, 0, sizeof(float) * static_cast<size_t>(panel * kDepth));
  }
  for (int64_t k = k0; k < k0 + depth;) {
    const int64_t o = k / count, t0 = k % count, t1 = std::min(count, t0 + k0 + depth - k);
    const int64_t start = (group * p.geometry.group_rows() + o) * width + c0 * all;
    prefetch_weights(p.weights, start + kAhead * width, rows * all);
    kernels.decode(p.weights, start, rows * all, line);
    for (int64_t t = t0; t < t1; ++t, ++k) {
      const float *source = line + p.taps[static_cast<size_t>(t)].index;
      if (panel == 8) {
        scatter_line<8>(source, all, rows, a + (k - k0) * panel);
      } else {
        scatter_line<4>(source, all, rows, a + (k - k0) * panel);
      }
    }
  }
}

struct Blocks {
  int64_t row_block, column_block, row_count, column_count;
};

// Tiles as large as the caches like, but enough of them for the threads.
Blocks make_blocks(const Product &p, const PathKernels &kernels, int threads) {
  const int64_t width = round_up(p.lattice.positions, kernels.lanes);
  Blocks b{};
  const int64_t row_block = p.adjoint && p.geometry.taps() < 4 ? kWideRowBlock : kRowBlock;
  b.row_block = std::min(row_block, round_up(p.rows, kernels.tile_rows));
  b.column_count = divide_up(width, kColumnBlock);
  b.column_block = round_up(divide_up(width, b.column_count), kernels.tile_columns);
  const auto tasks = [&] {
    b.row_count = divide_up(p.rows, b.row_block);
    b.column_count = divide_up(width, b.column_block);
    return p.geometry.groups * b.row_count * b.column_count;
  };
  while (tasks() < 2 * threads) {
    if (b.row_block >= 4 * kernels.tile_rows) {
      b.row_block = round_up(b.row_block / 2, kernels.tile_rows);
    } else if (b.column_block >= 4 * kernels.tile_columns) {
      b.column_block = round_up(b.column_block / 2, kernels.tile_columns);
    } else {
      break;
    }
  }
  return b;
}

}  // namespace

void run_tiles(const Product &p) {
  const PathKernels &kernels = path_kernels();
  const int64_t depth = p.depth(), width = round_up(p.lattice.positions, kernels.lanes);
  const int64_t work = p.geometry.groups * p.rows * depth * width;
  const bool parallel = work > parallel_work() * kernels.lanes;
  const Blocks b = make_blocks(p, kernels, parallel ? omp_get_max_threads() : 1);
  std::vector<int64_t> offsets(static_cast<size_t>(depth));
  for (int64_t k = 0; k < depth; ++k) {
    offsets[static_cast<size_t>(k)] = p.offset(k / p.tap_count(), p.taps[static_cast<size_t>(k % p.tap_count())]);
  }
  const int64_t tasks = p.geometry.groups * b.row_count * b.column_count;
  const int64_t tile_width = round_up(b.column_block, kernels.tile_columns);
#pragma omp parallel if (parallel && tasks > 1)
  {
    const FloatBuffer a(b.row_block * kDepth), columns(tile_width * kDepth), c(b.row_block * tile_width);
    const FloatBuffer line(p.adjoint ? b.row_block * p.geometry.taps() + 16 : 0);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t q0 = task % b.column_count * b.column_block;
      const int64_t r0 = task / b.column_count % b.row_count * b.row_block;
      const int64_t group = task / b.column_count / b.row_count;
      const int64_t rows = std::min(b.row_block, p.rows - r0), q = std::min(b.column_block, width - q0);
      const int64_t panels = divide_up(rows, kernels.tile_rows);
      const float *base = p.base + group * p.group_stride + q0;
      if (depth == 0) std::memset(c.get(), 0, sizeof(float) * static_cast<size_t>(b.row_block * tile_width));
      for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
        const int64_t k = std::min(kDepth, depth - k0);
        if (p.adjoint) {
          pack_backward(p, kernels, group, r0, rows, k0, k, line.get(), a.get());
        } else {
          pack_forward(p, kernels, group, r0, rows, k0, k, a.get());
        }
        if (panels <= kPlanePanels) {
          kernels.multiply_planes(a.get(), p.adjoint, panels, base, offsets.data() + k0, q, k, c.get(), tile_width,
                                  k0 > 0);
          continue;
        }
        kernels.pack_columns(base, offsets.data() + k0, k, q, columns.get());
        kernels.multiply(a.get(), p.adjoint, panels, columns.get(), q, k, c.get(), tile_width, k0 > 0);
      }
      write_positions(p.lattice, p.grid, p.batch, p.channels, q0, q, rows, c.get(), tile_width,
                      p.out + (group * p.rows + r0) * p.grid.size[0] * p.grid.size[1] * p.grid.size[2]);
    }
  }
}

}  // namespace paikern

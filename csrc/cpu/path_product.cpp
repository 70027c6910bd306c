// z = V x and x = V^T g for any geometry (path_plan.h has the layout).
//
// Two plans give the same bits, since both add one fused product at a time in ascending reduction
// index:
//   tiles   V decoded panel by panel (64 x 192 at most) against packed columns: dense and mildly
//   pruned weights gather  the kept weights of a row as (plane, value) pairs, sums in registers:
//   cost follows what is kept
// Bytes: W once per 480 positions, its bits likewise; scratch is one tile a thread and the planes
// of the map.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "path_matvec.h"
#include "path_plan.h"

namespace paikern {
namespace {

constexpr int64_t kRowBlock = 64, kColumnBlock = 480;
constexpr int64_t kPlaneFloats = int64_t{1} << 23;  // 32 MB of planes at a time when the batch is large

// Below this density the gather plan is faster: 512 x 256 x 3 x 3 on 16 x 16 maps breaks even at
// 0.45 on AVX-512.
constexpr double kGatherDensity = 0.35;

// A product of R rows for each group: C[r, q] = sum_k A[r, k] base[offset[k] + q].
struct Product {
  const PathGeometry &geometry;
  const WeightView &weights;
  const Lattice &lattice;
  const Grid &grid;               // where the positions go
  const std::vector<Tap> &taps;   // those that take part
  const float *base;              // group 0; position 0 of the first plane
  int64_t group_stride;           // floats from one group's planes to the next
  int64_t plane_stride;           // floats a channel of the map being read
  int64_t batch, rows, channels;  // rows a group; channels of the map being written
  bool adjoint;                   // rows are column channels, k = (row of V, tap)
  float *out;

  int64_t tap_count() const { return static_cast<int64_t>(taps.size()); }
  int64_t depth() const { return (adjoint ? geometry.group_rows() : geometry.group_channels()) * tap_count(); }
  int64_t offset(int64_t channel, const Tap &tap) const {
    return channel * plane_stride + tap.phase * lattice.span + tap.shift;
  }
};

// Rows r0 .. r0 + rows of V for k0 .. k0 + depth, as panels [panel][row][kDepth]; missing rows are
// 0.
void pack_forward(const Product &p, const PathKernels &kernels, int64_t group, int64_t r0, int64_t rows, int64_t k0,
                  int64_t depth, float *a) {
  for (int64_t r = 0; r < round_up(rows, kernels.tile_rows); ++r, a += kDepth) {
    if (r >= rows) {
      std::memset(a, 0, sizeof(float) * kDepth);
      continue;
    }
    const int64_t row = group * p.rows + r0 + r;
    kernels.decode(p.weights, row * p.depth() + k0, depth, a);
  }
}

// The same for the adjoint: row r is a column channel, k runs over (row of V, tap); panels
// [panel][kDepth][row].
void pack_backward(const Product &p, const PathKernels &kernels, int64_t group, int64_t c0, int64_t rows, int64_t k0,
                   int64_t depth, float *line, float *a) {
  const int64_t all = p.geometry.taps(), count = p.tap_count(), width = p.geometry.depth();
  const int64_t panel = kernels.tile_rows, panels = divide_up(rows, panel);
  if (rows % panel)
    std::memset(a + (panels - 1) * panel * kDepth, 0, sizeof(float) * static_cast<size_t>(panel * kDepth));
  for (int64_t k = k0; k < k0 + depth;) {
    const int64_t o = k / count, t0 = k % count, t1 = std::min(count, t0 + k0 + depth - k);
    const int64_t row = group * p.geometry.group_rows() + o;
    kernels.decode(p.weights, row * width + c0 * all, rows * all, line);
    for (int64_t t = t0; t < t1; ++t, ++k) {
      const float *source = line + p.taps[static_cast<size_t>(t)].index;
      float *target = a + (k - k0) * panel;
      for (int64_t r = 0; r < rows; ++r) target[(r / panel) * panel * kDepth + r % panel] = source[r * all];
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
  b.row_block = std::min(kRowBlock, round_up(p.rows, kernels.tile_rows));
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

void run_tiles(const Product &p) {
  const PathKernels &kernels = path_kernels();
  const int64_t depth = p.depth(), width = round_up(p.lattice.positions, kernels.lanes);
  const int64_t work = p.geometry.groups * p.rows * depth * width;
  const bool parallel = work > kParallelWork * kernels.lanes;
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
        kernels.pack_columns(base, offsets.data() + k0, k, q, columns.get());
        kernels.multiply(a.get(), p.adjoint, panels, columns.get(), q, k, c.get(), tile_width, k0 > 0);
      }
      write_positions(p.lattice, p.grid, p.batch, p.channels, q0, q, rows, c.get(), tile_width,
                      p.out + (group * p.rows + r0) * p.grid.size[0] * p.grid.size[1] * p.grid.size[2]);
    }
  }
}

// |W|**p of one weight.
float weight_value(const WeightView &w, const PathKernels &kernels, int64_t index) {
  if (w.power == 0) return 1.0f;
  float value[16];
  kernels.decode(w, index, 1, value);
  return value[0];
}

// Calls visit(index) for every kept weight start <= index < start + count, ascending.
template <class Visit>
void for_kept(const WeightView &w, int64_t start, int64_t count, Visit visit) {
  const int64_t bytes = (w.numel + 7) / 8;
  for (int64_t i = 0; i < count; i += 56) {
    const int chunk = static_cast<int>(std::min<int64_t>(56, count - i));
    uint64_t bits = w.mask ? mask_bits(w.mask, bytes, start + i, chunk) : (uint64_t{1} << chunk) - 1;
    for (; bits; bits &= bits - 1) visit(start + i + __builtin_ctzll(bits));
  }
}

// The kept weights of rows r0 .. r1 as lists in ascending k; list r is entries begin[r] .. begin[r
// + 1].
struct KeptLists {
  std::vector<int64_t> begin;
  std::vector<PathEntry> entries;
};

void list_forward(const Product &p, const PathKernels &kernels, int64_t group, int64_t r0, int64_t r1,
                  KeptLists &lists) {
  const int64_t depth = p.depth(), taps = p.tap_count();
  lists.begin.assign(1, 0);
  lists.entries.clear();
  for (int64_t r = r0; r < r1; ++r) {
    const int64_t start = (group * p.rows + r) * depth;
    int64_t channel = 0, channel_end = start + taps;
    for_kept(p.weights, start, depth, [&](int64_t index) {
      while (index >= channel_end) {
        ++channel;
        channel_end += taps;
      }
      const Tap &tap = p.taps[static_cast<size_t>(index - channel_end + taps)];
      lists.entries.push_back({static_cast<int32_t>(p.offset(channel, tap)), weight_value(p.weights, kernels, index)});
    });
    lists.begin.push_back(static_cast<int64_t>(lists.entries.size()));
  }
}

void list_backward(const Product &p, const PathKernels &kernels, int64_t group, int64_t c0, int64_t c1,
                   const std::vector<int> &tap_slot, KeptLists &lists) {
  const int64_t all = p.geometry.taps(), depth = p.geometry.depth(), rows = p.geometry.group_rows();
  const auto scan = [&](auto visit) {
    for (int64_t o = 0; o < rows; ++o) {
      const int64_t start = (group * rows + o) * depth + c0 * all;
      int64_t channel = 0, channel_end = start + all;
      for_kept(p.weights, start, (c1 - c0) * all, [&](int64_t index) {
        while (index >= channel_end) {
          ++channel;
          channel_end += all;
        }
        const int slot = tap_slot[static_cast<size_t>(index - channel_end + all)];
        if (slot >= 0) visit(o, channel, slot, index);
      });
    }
  };
  const size_t count = static_cast<size_t>(c1 - c0);
  lists.begin.assign(count + 1, 0);
  scan([&](int64_t, int64_t channel, int, int64_t) { ++lists.begin[static_cast<size_t>(channel) + 1]; });
  for (size_t c = 0; c < count; ++c) lists.begin[c + 1] += lists.begin[c];
  lists.entries.resize(static_cast<size_t>(lists.begin[count]));
  std::vector<int64_t> next(lists.begin.begin(), lists.begin.end() - 1);
  scan([&](int64_t o, int64_t channel, int slot, int64_t index) {
    lists.entries[static_cast<size_t>(next[static_cast<size_t>(channel)]++)] = {
        static_cast<int32_t>(p.offset(o, p.taps[static_cast<size_t>(slot)])), weight_value(p.weights, kernels, index)};
  });
}

void run_gather(const Product &p, double density) {
  constexpr int64_t kWidth = 2048, kListEntries = 1 << 15;
  const PathKernels &kernels = path_kernels();
  const int64_t width = round_up(p.lattice.positions, kernels.lanes);
  const double kept = density * static_cast<double>(p.depth());
  const double work = kept * static_cast<double>(p.geometry.groups * p.rows * width);
  const bool parallel = work > static_cast<double>(kParallelWork * kernels.lanes);
  const int64_t threads = parallel ? omp_get_max_threads() : 1;
  // Small enough that the lists stay in L2 and that no list of a whole weight ever exists.
  int64_t block = std::clamp<int64_t>(static_cast<int64_t>(kListEntries / std::max(kept, 1.0)), 1, p.rows);
  if (threads > 1) block = std::min(block, std::max<int64_t>(1, divide_up(p.rows * p.geometry.groups, 4 * threads)));
  const int64_t blocks = divide_up(p.rows, block), tasks = p.geometry.groups * blocks;
  std::vector<int> tap_slot(static_cast<size_t>(p.geometry.taps()), -1);
  for (size_t t = 0; t < p.taps.size(); ++t) tap_slot[static_cast<size_t>(p.taps[t].index)] = static_cast<int>(t);
  const int64_t pixels = p.grid.size[0] * p.grid.size[1] * p.grid.size[2];
#pragma omp parallel if (parallel && tasks > 1)
  {
    const FloatBuffer c(kWidth);
    KeptLists lists;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t group = task / blocks, r0 = task % blocks * block, r1 = std::min(p.rows, r0 + block);
      if (p.adjoint) {
        list_backward(p, kernels, group, r0, r1, tap_slot, lists);
      } else {
        list_forward(p, kernels, group, r0, r1, lists);
      }
      const float *base = p.base + group * p.group_stride;
      for (int64_t r = r0; r < r1; ++r) {
        const int64_t first = lists.begin[static_cast<size_t>(r - r0)];
        const int64_t count = lists.begin[static_cast<size_t>(r - r0) + 1] - first;
        for (int64_t q = 0; q < width; q += kWidth) {
          const int64_t w = std::min(kWidth, width - q);
          kernels.gather(lists.entries.data() + first, count, base + q, w, c.get());
          write_positions(p.lattice, p.grid, p.batch, p.channels, q, w, 1, c.get(), kWidth,
                          p.out + (group * p.rows + r) * pixels);
        }
      }
    }
  }
}

void run(const Product &p, double density, int64_t planes) {
  // Gather lists hold 32-bit offsets; with few rows a group the tiles would be mostly padding.
  const bool short_planes = planes < (int64_t{1} << 31);
  if (short_planes && (density < kGatherDensity || p.rows < path_kernels().tile_rows / 2)) {
    run_gather(p, density);
  } else {
    run_tiles(p);
  }
}

// Images a pass, so that the planes of large batches stay within kPlaneFloats.
int64_t images_a_pass(int64_t batch, int64_t channels, int64_t image) {
  return std::clamp<int64_t>(kPlaneFloats / std::max<int64_t>(1, channels * image), 1, batch);
}

}  // namespace

void path_forward(const PathGeometry &g, const WeightView &w, const float *x, float *z) {
  if (g.linear() && g.batch <= 4) return matvec_rows(g.rows, g.channels, w, x, g.batch, z);
  const double density = mask_density(w);
  const int64_t images = images_a_pass(g.batch, g.channels, g.pixels());
  for (int64_t n = 0; n < g.batch; n += images) {
    const int64_t batch = std::min(images, g.batch - n);
    const ForwardPlan plan = plan_forward(g, batch);
    const int64_t plane_stride = static_cast<int64_t>(plan.planes.size()) * plan.lattice.span;
    const int64_t planes = g.channels * plane_stride;
    const FloatBuffer buffer(planes + 64);
    fill_planes(plan.lattice, plan.planes, batch, g.channels, x + n * g.channels * g.pixels(), buffer.get());
    const Grid grid = whole_grid(g.out);
    run({g, w, plan.lattice, grid, plan.taps, buffer.get() + plan.lattice.lead, g.group_channels() * plane_stride,
         plane_stride, batch, g.group_rows(), g.rows, false, z + n * g.rows * g.out_pixels()},
        density, planes);
  }
}

void path_backward(const PathGeometry &g, const WeightView &w, const float *grad, float *x) {
  if (g.linear() && g.batch <= 4) return matvec_columns(g.rows, g.channels, w, grad, g.batch, x);
  const double density = mask_density(w);
  const int64_t images = images_a_pass(g.batch, g.rows, g.out_pixels());
  for (int64_t n = 0; n < g.batch; n += images) {
    const int64_t batch = std::min(images, g.batch - n);
    const BackwardPlan plan = plan_backward(g, batch);
    const int64_t planes = g.rows * plan.lattice.span;
    const FloatBuffer buffer(planes + 64);
    fill_planes(plan.lattice, {whole_grid(g.out)}, batch, g.rows, grad + n * g.rows * g.out_pixels(), buffer.get());
    for (const BackwardPhase &phase : plan.phases) {
      run({g, w, plan.lattice, phase.grid, phase.taps, buffer.get() + plan.lattice.lead,
           g.group_rows() * plan.lattice.span, plan.lattice.span, batch, g.group_channels(), g.channels, true,
           x + n * g.channels * g.pixels()},
          density, planes);
    }
  }
}

}  // namespace paikern

#include "path_outer.h"

#include "path_few.h"

namespace paikern {
namespace {

// Lines of a map as runs that a tile reads from L1.
void add_run(std::vector<OuterRun> &runs, int64_t g, int64_t x, int64_t length) {
  if (!runs.empty()) {
    const OuterRun &last = runs.back();
    if (last.g + last.length == g && last.x + last.length == x && last.length < kDepth) {
      g = last.g;
      x = last.x;
      length += last.length;
      runs.pop_back();
    }
  }
  for (; length > 0; g += kDepth, x += kDepth, length -= kDepth) runs.push_back({g, x, std::min(kDepth, length)});
}

// Visits the lines of positions: visit(offset in a map [batch, channels, out], flat position).
template <class Visit>
void for_lines(const PathGeometry &geometry, const Lattice &lattice, int64_t channels, Visit visit) {
  for (int64_t n = 0; n < geometry.batch; ++n) {
    for (int64_t d = 0; d < geometry.out[0]; ++d) {
      for (int64_t h = 0; h < geometry.out[1]; ++h) {
        visit(n * channels * geometry.out_pixels() + (d * geometry.out[1] + h) * geometry.out[2],
              lattice.flat(n, d, h, 0));
      }
    }
  }
}

}  // namespace

OuterMaps::OuterMaps(const PathGeometry &geometry, const float *x, const float *g, const WeightView *kept)
    : geometry_(geometry), x_(x), g_(g), x_planes_(0), g_planes_(0), g_rows_(0), blocks_(0) {
  if (geometry.linear()) {
    lay_out_linear();
    return;
  }
  const ForwardPlan plan = plan_forward(geometry_, geometry_.batch);
  span_ = plan.lattice.span;
  lead_ = plan.lattice.lead;
  length_ = geometry_.batch > 0 ? round_up(plan.lattice.positions, path_kernels().lanes) : 0;
  const int64_t plane_stride = static_cast<int64_t>(plan.planes.size()) * span_;
  x_group_ = geometry_.group_channels() * plane_stride;
  for (const Tap &tap : plan.taps) shifts_.push_back(tap.phase * span_ + tap.shift);
  plan_ = choose(kept);
  if (plan_ != Plan::kBlocks) {
    offsets_.reserve(static_cast<size_t>(geometry_.depth()) + 16);
    for (int64_t c = 0; c < geometry_.group_channels(); ++c) {
      for (const int64_t shift : shifts_) offsets_.push_back(static_cast<int32_t>(c * plane_stride + shift));
    }
    offsets_.resize(offsets_.size() + 16);
    make_planes(plan);
  }
  if (plan_ == Plan::kBlocks) make_blocks(plan);
  if (plan_ == Plan::kColumns) make_columns(plan);
}

// Measured on AVX-512; what a mask decides is the same for all pieces of a layer.
OuterMaps::Plan OuterMaps::choose(const WeightView *kept) const {
  if (x_group_ > INT32_MAX) return Plan::kBlocks;  // offsets within a group have 32 bits
  if (kept && kept->mask) {
    const double density = mask_density(*kept);
    if (density < kept_density(positions()) && !few_shapes(geometry_)) return Plan::kKept;
  }
  if (2 * geometry_.group_channels() < path_kernels().lanes) return Plan::kDots;
  // To transpose a column for every tap costs what three halves of a row spend on putting a sum in order.
  return geometry_.taps() > 1 && 2 * positions() < 3 * geometry_.group_rows() ? Plan::kColumns : Plan::kBlocks;
}

// One position an image: x [batch, channels] in vectors, g [batch, rows] as it is.
void OuterMaps::lay_out_linear() {
  const int64_t lanes = path_kernels().lanes, batch = geometry_.batch, channels = geometry_.channels;
  plan_ = Plan::kLinear;
  group_blocks_ = divide_up(channels, lanes);
  block_stride_ = batch * lanes;
  blocks_ = FloatBuffer(group_blocks_ * block_stride_);
  for (int64_t c = 0; c < channels; c += lanes) {
    const int64_t count = std::min(lanes, channels - c);
    for (int64_t n = 0; n < batch; ++n) {
      float *target = blocks_.get() + c / lanes * block_stride_ + n * lanes;
      std::memcpy(target, x_ + n * channels + c, sizeof(float) * static_cast<size_t>(count));
      std::fill(target + count, target + lanes, 0.0f);
    }
  }
  shifts_.assign(1, 0);
  add_run(runs_, 0, 0, batch);
  make_rows();
}

void OuterMaps::make_planes(const ForwardPlan &plan) {
  x_planes_ = FloatBuffer(geometry_.groups * x_group_);
  fill_planes(plan.lattice, plan.planes, geometry_.batch, geometry_.channels, x_, x_planes_.get());
  if (plan_ == Plan::kColumns) return;
  // Zeros between the rows of G cancel the positions that no output has.
  g_planes_ = FloatBuffer(geometry_.rows * span_);
  fill_planes(plan.lattice, {whole_grid(geometry_.out)}, geometry_.batch, geometry_.rows, g_, g_planes_.get());
}

// G where it lies, or with zeros behind when the last panel of rows is not whole.
void OuterMaps::make_rows() {
  const int64_t panel = path_kernels().tile_rows, rows = geometry_.rows;
  const int64_t floats = geometry_.batch * rows * geometry_.out_pixels();
  rows_ = g_;
  row_step_ = plan_ == Plan::kLinear ? 1 : geometry_.out_pixels();
  position_step_ = plan_ == Plan::kLinear ? rows : 1;
  row_end_ = round_up(rows, panel);
  if (rows == row_end_) return;
  g_rows_ = FloatBuffer(floats + panel * row_step_);
  std::memcpy(g_rows_.get(), g_, sizeof(float) * static_cast<size_t>(floats));
  std::fill_n(g_rows_.get() + floats, panel * row_step_, 0.0f);
  rows_ = g_rows_.get();
}

// One plane of `count` channels, zeros in the gaps.
void OuterMaps::pack_plane(const Lattice &lattice, const Grid &grid, int64_t channel, int64_t count,
                           float *block) const {
  const PathKernels &kernels = path_kernels();
  const int64_t lanes = kernels.lanes, pixels = geometry_.pixels();
  int64_t offsets[16], done = 0;
  for (int64_t i = 0; i < count; ++i) offsets[i] = i * pixels;
  for (int64_t n = 0; n < geometry_.batch; ++n) {
    for (int64_t d = 0; d < grid.count[0]; ++d) {
      for (int64_t h = 0; h < grid.count[1]; ++h) {
        const int64_t start = lattice.lead + lattice.flat(n, d, h, 0);
        const int64_t pixel =
            ((grid.first[0] + d * grid.step[0]) * grid.size[1] + grid.first[1] + h * grid.step[1]) * grid.size[2];
        const float *line = x_ + (n * geometry_.channels + channel) * pixels + pixel + grid.first[2];
        std::fill(block + done * lanes, block + start * lanes, 0.0f);
        kernels.pack_lanes(line, offsets, count, grid.count[2], grid.step[2], block + start * lanes);
        done = start + grid.count[2];
      }
    }
  }
  std::fill(block + done * lanes, block + lattice.span * lanes, 0.0f);
}

void OuterMaps::make_blocks(const ForwardPlan &plan) {
  const int64_t lanes = path_kernels().lanes, channels = geometry_.group_channels();
  const int64_t planes = static_cast<int64_t>(plan.planes.size());
  group_blocks_ = divide_up(channels, lanes);
  block_stride_ = planes * span_ * lanes;
  const int64_t tasks = geometry_.groups * group_blocks_ * planes;
  blocks_ = FloatBuffer(tasks * span_ * lanes);
#pragma omp parallel for schedule(static) if (tasks * span_ * lanes > parallel_work())
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t c = task / planes % group_blocks_ * lanes, group = task / planes / group_blocks_;
    pack_plane(plan.lattice, plan.planes[static_cast<size_t>(task % planes)], group * channels + c,
               std::min(lanes, channels - c), blocks_.get() + task * span_ * lanes);
  }
  for_lines(geometry_, plan.lattice, geometry_.rows,
            [&](int64_t g, int64_t x) { add_run(runs_, g, x, geometry_.out[2]); });
  for (int64_t &shift : shifts_) shift += lead_;
  make_rows();
}

void OuterMaps::make_columns(const ForwardPlan &plan) {
  const PathKernels &kernels = path_kernels();
  const int64_t lanes = kernels.lanes, columns = geometry_.depth(), line = geometry_.out[2];
  group_blocks_ = divide_up(columns, lanes);
  block_stride_ = positions() * lanes;
  const int64_t tasks = geometry_.groups * group_blocks_;
  blocks_ = FloatBuffer(tasks * block_stride_);
  const std::vector<int64_t> offsets(offsets_.begin(), offsets_.end());
#pragma omp parallel for schedule(static) if (tasks * block_stride_ > parallel_work())
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t j = task % group_blocks_ * lanes;
    float *target = blocks_.get() + task * block_stride_;
    for_lines(geometry_, plan.lattice, geometry_.rows, [&](int64_t, int64_t flat) {
      kernels.pack_lanes(x_plane(task / group_blocks_) + flat, offsets.data() + j, std::min(lanes, columns - j), line,
                         1, target);
      target += line * lanes;
    });
  }
  int64_t position = 0;
  for_lines(geometry_, plan.lattice, geometry_.rows, [&](int64_t g, int64_t) {
    add_run(runs_, g, position, line);
    position += line;
  });
  shifts_.assign(1, 0);
  make_rows();
}

// From the maps themselves.
float OuterMaps::nearly(int64_t row, int64_t column) const {
  const PathGeometry &p = geometry_;
  const int64_t tap = column % p.taps(), channel = row / p.group_rows() * p.group_channels() + column / p.taps();
  const int64_t at[3] = {tap / (p.kernel[1] * p.kernel[2]), tap / p.kernel[2] % p.kernel[1], tap % p.kernel[2]};
  int64_t from[3], to[3], reach[3];
  for (int a = 0; a < 3; ++a) {  // outputs whose input is inside the map
    reach[a] = at[a] * p.dilation[a] - p.padding[a];
    from[a] = std::max<int64_t>(0, divide_up(-reach[a], p.stride[a]));
    to[a] = std::min(p.out[a], floor_divide(p.size[a] - 1 - reach[a], p.stride[a]) + 1);
  }
  float sum = 0.0f;
  for (int64_t n = 0; n < p.batch; ++n) {
    const float *x = x_ + (n * p.channels + channel) * p.pixels(), *g = g_ + (n * p.rows + row) * p.out_pixels();
    for (int64_t d = from[0]; d < to[0]; ++d) {
      for (int64_t h = from[1]; h < to[1]; ++h) {
        const float *line = x + ((d * p.stride[0] + reach[0]) * p.size[1] + h * p.stride[1] + reach[1]) * p.size[2];
        const float *gs = g + (d * p.out[1] + h) * p.out[2];
        for (int64_t w = from[2]; w < to[2]; ++w) sum += line[w * p.stride[2] + reach[2]] * gs[w];
      }
    }
  }
  return sum;
}

OuterTiles::OuterTiles(const PathGeometry &geometry, const OuterMaps &maps)
    : kernels(path_kernels()), geometry_(geometry), maps_(maps) {
  const int64_t columns = geometry.depth(), taps = geometry.taps();
  unit = maps.by_dots() ? taps : std::min(columns, taps > 1 ? taps * kernels.lanes : kernels.tile_columns);
  width = std::min(columns, std::max(unit, kTileColumns / unit * unit));
  width = std::min(columns, round_up(divide_up(columns, blocks()), unit));
  // Whole vectors are written behind the last column.
  ld_ = round_up(width, kernels.lanes) + kernels.lanes;
  strip_ = round_up(std::clamp<int64_t>(kTileFloats / ld_, 1, 256), kernels.tile_rows);
}

OuterTiles::Memory OuterTiles::memory(int64_t rows) const {
  const int64_t tile_rows = std::min(strip_, round_up(rows, kernels.tile_rows));
  const int64_t taps = maps_.by_dots() ? 1 : maps_.taps();
  return {FloatBuffer(taps > 1 ? tile_rows * taps * kernels.lanes : 0), FloatBuffer(tile_rows * ld_ + 64)};
}

// Returns where the first row is: where panels would pass the last row of G, all start earlier.
const float *OuterTiles::multiply(int64_t group, int64_t row, int64_t rows, int64_t j0, int64_t count,
                                  const Memory &memory) const {
  const int64_t taps = maps_.taps(), lanes = kernels.lanes, panel = kernels.tile_rows;
  const int64_t base = std::min(row, maps_.row_end() - round_up(rows, panel)), end = row + rows - base;
  // Vectors of columns: sums are where they belong. Else [row][tap][lane] for one block of channels, interleaved at the
  // end.
  const int64_t vectors = taps > 1 ? taps : divide_up(count, lanes), ld = taps > 1 ? taps * lanes : ld_;
  const int64_t all = divide_up(count, vectors * lanes);
  float *sums = taps > 1 ? memory.sums.get() : memory.q.get();
  const std::vector<OuterRun> &runs = maps_.runs();
  for (int64_t i = 0; i < all; ++i) {
    const int64_t block = j0 / taps / lanes + i;
    size_t run = 0;
    do {
      const size_t first = run;
      for (int64_t depth = 0; run < runs.size() && depth + runs[run].length <= kDepth; ++run) depth += runs[run].length;
      for (int64_t v = 0; v < vectors; v += 3) {
        const int64_t here = std::min<int64_t>(3, vectors - v);
        const float *b[3];
        for (int64_t k = 0; k < here; ++k) {
          b[k] = taps > 1 ? maps_.block(group, block, v + k) : maps_.block(group, block + v + k, 0);
        }
        for (int64_t r = 0; r < end; r += panel) {
          kernels.outer(maps_.rows(base + r), maps_.row_step(), maps_.position_step(), b, here, runs.data() + first,
                        static_cast<int64_t>(run - first), sums + r * ld + v * lanes, ld, first > 0);
        }
      }
    } while (run < runs.size());
    if (taps == 1) continue;
    const int64_t channels = std::min(lanes, count / taps - i * lanes);
    for (int64_t r = row - base; r < end; ++r) {
      kernels.interleave(sums + r * ld, taps, channels, memory.q.get() + r * ld_ + i * lanes * taps);
    }
  }
  return memory.q.get() + (row - base) * ld_;
}

}  // namespace paikern

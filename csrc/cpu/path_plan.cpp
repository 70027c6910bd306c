#include "path_plan.h"

#include <algorithm>
#include <cstring>

namespace paikern {
namespace {

struct AxisTap {
  int64_t phase, shift;  // input index = (output index + shift) * stride + phase
};

AxisTap axis_tap(const PathGeometry &g, int axis, int64_t u) {
  const int64_t reach = u * g.dilation[axis] - g.padding[axis];
  const int64_t shift = floor_divide(reach, g.stride[axis]);
  return {reach - shift * g.stride[axis], shift};
}

// Positions of one axis of the column map in units of the stride.
int64_t axis_extent(const PathGeometry &g, int axis) { return divide_up(g.size[axis], g.stride[axis]); }

// Number of input indices m * stride + phase inside the map.
int64_t phase_count(const PathGeometry &g, int axis, int64_t phase) {
  return phase < g.size[axis] ? divide_up(g.size[axis] - phase, g.stride[axis]) : 0;
}

struct AxisGap {
  int64_t left, right;
};

// Rows hold `stored` values at positions 0 .. stored - 1 and are read at lowest .. highest.
AxisGap axis_gap(int64_t stored, int64_t lowest, int64_t highest) {
  return {std::max<int64_t>(0, -lowest), std::max<int64_t>(0, highest - (stored - 1))};
}

// Pitches that give every axis the zeros it needs, and the sizes that follow.
Lattice make_lattice(const AxisGap (&gap)[3], const int64_t (&stored)[3], const int64_t (&computed)[3], int64_t batch) {
  Lattice lattice{};
  for (int a = 0; a < 3; ++a) {
    lattice.pitch[a] = std::max(stored[a] + std::max(gap[a].left, gap[a].right), computed[a]);
  }
  lattice.positions = lattice.flat(batch - 1, computed[0] - 1, computed[1] - 1, computed[2] - 1) + 1;
  lattice.lead = lattice.flat(0, gap[0].left, gap[1].left, gap[2].left);
  // No valid position reads past its batch of images; whole tiles of 48 columns and 16 x 16
  // transposes read up to 62 floats more. Spans off multiples of 1 KiB keep the planes of
  // power-of-two maps off each other's cache sets.
  lattice.span = round_up(lattice.lead + batch * lattice.image() + 64, 16);
  if (lattice.span % 256 < 16) lattice.span += 16;
  return lattice;
}

}  // namespace

Grid whole_grid(const int64_t (&size)[3]) {
  return {{size[0], size[1], size[2]}, {0, 0, 0}, {1, 1, 1}, {size[0], size[1], size[2]}};
}

ForwardPlan plan_forward(const PathGeometry &g, int64_t batch) {
  ForwardPlan plan;
  AxisGap gap[3];
  int64_t stored[3], computed[3];
  for (int a = 0; a < 3; ++a) {
    stored[a] = axis_extent(g, a);
    computed[a] = g.out[a];
    const int64_t low = axis_tap(g, a, 0).shift, high = axis_tap(g, a, g.kernel[a] - 1).shift;
    gap[a] = axis_gap(stored[a], low, g.out[a] - 1 + high);
  }
  plan.lattice = make_lattice(gap, stored, computed, batch);
  std::vector<int64_t> plane(static_cast<size_t>(g.stride[0] * g.stride[1] * g.stride[2]), -1);
  for (int64_t d = 0, index = 0; d < g.kernel[0]; ++d) {
    for (int64_t h = 0; h < g.kernel[1]; ++h) {
      for (int64_t w = 0; w < g.kernel[2]; ++w, ++index) {
        const AxisTap t[3] = {axis_tap(g, 0, d), axis_tap(g, 1, h), axis_tap(g, 2, w)};
        int64_t &id = plane[static_cast<size_t>((t[0].phase * g.stride[1] + t[1].phase) * g.stride[2] + t[2].phase)];
        if (id < 0) {
          id = static_cast<int64_t>(plan.planes.size());
          Grid grid{};
          for (int a = 0; a < 3; ++a) {
            grid.count[a] = phase_count(g, a, t[a].phase);
            grid.first[a] = t[a].phase;
            grid.step[a] = g.stride[a];
            grid.size[a] = g.size[a];
          }
          plan.planes.push_back(grid);
        }
        plan.taps.push_back({index, id, plan.lattice.flat(0, t[0].shift, t[1].shift, t[2].shift)});
      }
    }
  }
  return plan;
}

BackwardPlan plan_backward(const PathGeometry &g, int64_t batch) {
  BackwardPlan plan;
  AxisGap gap[3];
  int64_t stored[3], computed[3];
  for (int a = 0; a < 3; ++a) {
    stored[a] = g.out[a];
    computed[a] = axis_extent(g, a);
    const int64_t low = axis_tap(g, a, 0).shift, high = axis_tap(g, a, g.kernel[a] - 1).shift;
    gap[a] = axis_gap(stored[a], -high, computed[a] - 1 - low);
  }
  plan.lattice = make_lattice(gap, stored, computed, batch);
  for (int64_t rd = 0; rd < g.stride[0]; ++rd) {
    for (int64_t rh = 0; rh < g.stride[1]; ++rh) {
      for (int64_t rw = 0; rw < g.stride[2]; ++rw) {
        const int64_t phase[3] = {rd, rh, rw};
        BackwardPhase part{};
        for (int a = 0; a < 3; ++a) {
          part.grid.count[a] = phase_count(g, a, phase[a]);
          part.grid.first[a] = phase[a];
          part.grid.step[a] = g.stride[a];
          part.grid.size[a] = g.size[a];
        }
        if (part.grid.count[0] * part.grid.count[1] * part.grid.count[2] == 0) continue;
        for (int64_t d = 0, index = 0; d < g.kernel[0]; ++d) {
          for (int64_t h = 0; h < g.kernel[1]; ++h) {
            for (int64_t w = 0; w < g.kernel[2]; ++w, ++index) {
              const AxisTap t[3] = {axis_tap(g, 0, d), axis_tap(g, 1, h), axis_tap(g, 2, w)};
              if (t[0].phase != rd || t[1].phase != rh || t[2].phase != rw) continue;
              part.taps.push_back({index, 0, -plan.lattice.flat(0, t[0].shift, t[1].shift, t[2].shift)});
            }
          }
        }
        plan.phases.push_back(std::move(part));
      }
    }
  }
  return plan;
}

void fill_planes(const Lattice &lattice, const std::vector<Grid> &grids, int64_t batch, int64_t channels,
                 const float *map, float *planes) {
  const PathKernels &kernels = path_kernels();
  const int64_t count = static_cast<int64_t>(grids.size());
  const int64_t pixels = grids[0].size[0] * grids[0].size[1] * grids[0].size[2];
#pragma omp parallel for schedule(static) if (channels * count * lattice.span > parallel_work())
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = 0; p < count; ++p) {
      const Grid &grid = grids[static_cast<size_t>(p)];
      float *plane = planes + (c * count + p) * lattice.span;
      std::memset(plane, 0, sizeof(float) * static_cast<size_t>(lattice.span));
      plane += lattice.lead;
      for (int64_t n = 0; n < batch; ++n) {
        const float *image = map + (n * channels + c) * pixels;
        for (int64_t d = 0; d < grid.count[0]; ++d) {
          const int64_t row = (grid.first[0] + d * grid.step[0]) * grid.size[1] + grid.first[1];
          kernels.fill_rows(image + row * grid.size[2] + grid.first[2], grid.step[1] * grid.size[2], grid.step[2],
                            grid.count[1], grid.count[2], plane + lattice.flat(n, d, 0, 0), lattice.pitch[2]);
        }
      }
    }
  }
}

void write_positions(const Lattice &lattice, const Grid &grid, int64_t batch, int64_t channels, int64_t first,
                     int64_t width, int64_t rows, const float *block, int64_t ld, float *map) {
  const PathKernels &kernels = path_kernels();
  const int64_t pixels = grid.size[0] * grid.size[1] * grid.size[2], last = first + width;
  if (pixels == 1 && lattice.image() == 1) {  // a linear layer: the block is the transpose of the map
    for (int64_t n = first; n < std::min(last, batch); ++n) {
      for (int64_t r = 0; r < rows; ++r) map[n * channels + r] = block[r * ld + n - first];
    }
    return;
  }
  for (int64_t n = first / lattice.image(); n < batch; ++n) {
    for (int64_t d = 0; d < grid.count[0]; ++d) {
      for (int64_t h = 0; h < grid.count[1];) {
        const int64_t start = lattice.flat(n, d, h, 0);
        if (start >= last) return;
        const int64_t from = std::max<int64_t>(0, first - start), to = std::min(grid.count[2], last - start);
        // As many rows as lie whole in the block, else what there is of one.
        const bool whole = from == 0 && to == grid.count[2];
        const int64_t lines = whole ? std::min(grid.count[1] - h, (last - start - to) / lattice.pitch[2] + 1) : 1;
        const int64_t row = (grid.first[0] + d * grid.step[0]) * grid.size[1] + grid.first[1] + h * grid.step[1];
        float *target = map + n * channels * pixels + row * grid.size[2] + grid.first[2] + from * grid.step[2];
        for (int64_t r = 0; r < rows && from < to; ++r) {
          kernels.write_rows(block + r * ld + start + from - first, lattice.pitch[2], grid.step[2], lines, to - from,
                             target + r * pixels, grid.step[1] * grid.size[2]);
        }
        h += lines;
      }
    }
  }
}

std::vector<int32_t> pixel_table(const PathGeometry &g) {
  std::vector<int32_t> table;
  const int64_t outside = g.pixels();
  for (int64_t d = 0; d < g.out[0]; ++d) {
    for (int64_t h = 0; h < g.out[1]; ++h) {
      for (int64_t w = 0; w < g.out[2]; ++w) {
        const int64_t at[3] = {d, h, w};
        for (int64_t t = 0; t < g.taps(); ++t) {
          const int64_t tap[3] = {t / (g.kernel[1] * g.kernel[2]), t / g.kernel[2] % g.kernel[1], t % g.kernel[2]};
          int64_t pixel = 0;
          bool inside = true;
          for (int a = 0; a < 3; ++a) {
            const int64_t i = at[a] * g.stride[a] - g.padding[a] + tap[a] * g.dilation[a];
            inside &= i >= 0 && i < g.size[a];
            pixel = pixel * g.size[a] + i;
          }
          table.push_back(static_cast<int32_t>(inside ? pixel : outside));
        }
      }
    }
  }
  return table;
}

double mask_density(const WeightView &w) {
  if (!w.mask || w.numel == 0) return 1.0;
  if (w.density >= 0.0) return w.density;
  constexpr int64_t kBlock = 1 << 16;
  const int64_t bytes = (w.numel + 7) / 8, blocks = divide_up(bytes, kBlock);
  const PathKernels &kernels = path_kernels();
  int64_t kept = 0;
#pragma omp parallel for schedule(static) \
    reduction(+ : kept) if (bytes > std::max<int64_t>(parallel_work() / 8, 1 << 16))
  for (int64_t i = 0; i < blocks; ++i) {
    kept += kernels.count_bits(w.mask + i * kBlock, std::min(kBlock, bytes - i * kBlock));
  }
  return static_cast<double>(kept) / static_cast<double>(w.numel);
}

}  // namespace paikern

#include "masked_conv_pointwise.h"

#include <omp.h>

#include <algorithm>

#include "masked_conv_chunks.h"
#include "masked_conv_lists.h"

namespace paikern {
namespace {

// One plane a channel, as long as an image.
Lattice image_lattice(const ConvShape &s) {
  Lattice lattice{};
  lattice.span = s.pixels();
  return lattice;
}

ForwardPlan forward_plan(const ConvShape &s) { return {image_lattice(s), {Grid{}}, {{0, 0, 0}}}; }

// Tiles over one image, ascending; the last overlaps the one before rather than pass the end.
std::vector<ConvTile> image_tiles(int64_t pixels, const ConvKernels &kernels) {
  const int64_t lanes = kernels.lanes, all = pixels / lanes, parts = divide_up(all, kernels.vectors);
  std::vector<ConvTile> tiles;
  for (int64_t p = 0, v = 0; p < parts; ++p) {
    const int64_t next = all * (p + 1) / parts;
    tiles.push_back({v * lanes, v * lanes, next - v});
    v = next;
  }
  if (pixels % lanes) tiles.push_back({pixels - lanes, pixels - lanes, 1});
  return tiles;
}

void product(const ConvShape &s, const ConvLists &lists, const float *in, int64_t from, const float *bias, float *out,
             int64_t to, const ConvKernels &kernels) {
  const int64_t pixels = s.pixels();
  const std::vector<ConvTile> tiles = image_tiles(pixels, kernels);
  const int64_t count = static_cast<int64_t>(tiles.size());
  // Tiles at once: their window stays in L2 while the rows of V take turns.
  const int64_t wide = std::clamp<int64_t>(kConvWindow / (from * kernels.lanes * kernels.vectors), 1, count);
  const int64_t chunks = divide_up(count, wide);
  const bool parallel = (lists.kept() + to) * (s.batch * pixels / kernels.lanes + 1) > parallel_work() / 8;
  const int64_t wanted = parallel ? 4 * omp_get_max_threads() : 1;
  const int64_t high = std::max<int64_t>(1, to / divide_up(wanted, s.batch * chunks)), blocks = divide_up(to, high);
#pragma omp parallel for schedule(dynamic) if (parallel)
  for (int64_t task = 0; task < s.batch * chunks * blocks; ++task) {
    const int64_t n = task / (chunks * blocks), tile = task / blocks % chunks * wide;
    const int64_t first = task % blocks * high, last = std::min(to, first + high);
    for (int64_t c = first; c < last; ++c) {
      const float *planes = in + (n * from + c / (to / s.groups) * (from / s.groups)) * pixels;
      kernels.products(lists.get(c), bias ? bias[c] : 0.0f, planes, tiles.data() + tile, std::min(wide, count - tile),
                       out + (n * to + c) * pixels);
    }
  }
}

}  // namespace

bool pointwise(const ConvShape &s, ConvMap map, const ConvKernels &kernels) {
  for (int a = 0; a < 2; ++a) {
    if (s.kernel[a] != 1 || s.stride[a] != 1 || s.padding[a] != 0) return false;
  }
  const int64_t pixels = s.pixels();
  if (map.type != WeightType::kFloat32 || pixels < kernels.lanes) return false;
  if (std::max(s.rows, s.channels) / s.groups * pixels > INT32_MAX) return false;
  return pixels % kernels.lanes == 0 || pixels >= 8 * kernels.lanes || s.batch < kernels.lanes / 2;
}

void pointwise_output(const ConvShape &s, const ConvEntries &v, const float *x, const float *bias, float *y,
                      const ConvKernels &kernels) {
  product(s, forward_lists(v, s, forward_plan(s)), x, s.channels, bias, y, s.rows, kernels);
}

void pointwise_input(const ConvShape &s, const ConvEntries &transposed, const float *g, float *x,
                     const ConvKernels &kernels) {
  const BackwardPlan plan{image_lattice(s), {{Grid{}, {{0, 0, 0}}}}};
  product(s, input_lists(transposed, s, plan), g, s.rows, nullptr, x, s.channels, kernels);
}

void pointwise_kept(const ConvShape &s, const ConvEntries &v, const float *g, const float *x, float *out,
                    const ConvKernels &kernels) {
  const int64_t pixels = s.pixels(), group_rows = s.rows / s.groups, group_channels = s.channels / s.groups;
  const ConvLists lists = forward_lists(v, s, forward_plan(s));
  const int64_t lanes = kernels.lanes, step = std::max<int64_t>(1, kConvWindow / (s.channels * lanes));
  const bool parallel = lists.kept() * (s.batch * pixels / lanes) > parallel_work() / 8;
  const std::vector<int64_t> ranges = lists.split(parallel ? 2 * omp_get_max_threads() : 1);
  const int64_t parts = static_cast<int64_t>(ranges.size()) - 1;
#pragma omp parallel for schedule(dynamic) if (parallel)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = ranges[static_cast<size_t>(part)], last = ranges[static_cast<size_t>(part) + 1];
    for (int64_t n = 0; n < s.batch; ++n) {
      for (int64_t at = 0; at < pixels; at += step * lanes) {
        const ConvTile tile{at, at, std::min(step, (pixels - at) / lanes)};
        for (int64_t r = first; r < last; ++r) {
          kernels.dots(lists.get(r), g + (n * s.rows + r) * pixels,
                       x + (n * s.channels + r / group_rows * group_channels) * pixels, &tile, 1, n > 0 || at > 0,
                       out + lists.begin(r));
        }
      }
    }
  }
}

}  // namespace paikern

// Convolutions with a packed weight, without a column matrix.
//
// A map becomes planes [channel][phase of the stride][row][column][image], up to `lanes` images side by side and zeros
// where the padding is (path_plan.h, the images as a third axis). A tap of the kernel is then one shift of a plane, and
// an entry of V reads whole vectors at an offset that is known before: 16 images make every load aligned, and no
// position between two rows need be computed.
//
// Outputs are cut into chunks whose window of all channels stays in L2, and rows of V go over one chunk after the other
// (masked_conv_chunks.h).
#include "masked_conv.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "isa.h"
#include "masked_conv_chunks.h"
#include "masked_conv_kernels.h"
#include "masked_conv_lists.h"
#include "masked_conv_pointwise.h"
#include "path_plan.h"

namespace paikern {
namespace {

constexpr int64_t kPlaneFloats = 6 << 20;  // of planes at a time: 24 MB, which the scratch pool keeps

// The images of one block as the third axis.
PathGeometry geometry_of(const ConvShape &s, int64_t images) {
  PathGeometry g{1, s.groups, s.rows, s.channels, {}, {}, {}, {}, {}, {}};
  for (int a = 0; a < 2; ++a) {
    g.size[a] = s.size[a];
    g.kernel[a] = s.kernel[a];
    g.stride[a] = s.stride[a];
    g.padding[a] = s.padding[a];
    g.dilation[a] = s.dilation[a];
    g.out[a] = s.out[a];
  }
  g.size[2] = g.out[2] = images;
  g.kernel[2] = g.stride[2] = g.dilation[2] = 1;
  g.padding[2] = 0;
  return g;
}

// As many images at a time as give whole vectors, halved while their planes are too large.
int64_t images_at_once(const ConvShape &s, int64_t floats_an_image, int64_t lanes) {
  int64_t images = lanes;
  while (images > 1 && images * floats_an_image > kPlaneFloats) images /= 2;
  return std::min(images, s.batch);
}

// Where the pixels of a map go in the planes of one channel, -1 for those that no tap reads.
std::vector<int32_t> plane_table(const Lattice &lattice, const std::vector<Grid> &grids) {
  std::vector<int32_t> table(static_cast<size_t>(grids[0].size[0] * grids[0].size[1]), -1);
  for (size_t g = 0; g < grids.size(); ++g) {
    const Grid &grid = grids[g];
    const int64_t start = static_cast<int64_t>(g) * lattice.span + lattice.lead;
    for (int64_t h = 0; h < grid.count[0]; ++h) {
      for (int64_t w = 0; w < grid.count[1]; ++w) {
        const int64_t pixel = (grid.first[0] + h * grid.step[0]) * grid.size[1] + grid.first[1] + w * grid.step[1];
        table[static_cast<size_t>(pixel)] = static_cast<int32_t>(start + lattice.flat(0, h, w, 0));
      }
    }
  }
  return table;
}

std::vector<ConvRun> runs_of(const std::vector<int32_t> &table) {
  std::vector<ConvRun> runs;
  for (size_t p = 0; p < table.size(); ++p) {
    if (table[p] < 0) continue;
    if (!runs.empty()) {
      ConvRun &last = runs.back();
      if (last.pixel + last.count == static_cast<int64_t>(p) && last.at + last.count == table[p]) {
        ++last.count;
        continue;
      }
    }
    runs.push_back({static_cast<int64_t>(p), table[p], 1});
  }
  return runs;
}

int64_t type_size(WeightType type) { return type == WeightType::kFloat32 ? 4 : 2; }

// planes [channels][per_channel] <- images first .. first + count of a map [batch, channels, pixels].
void fill(const ConvKernels &kernels, ConvMap map, int64_t channels, int64_t pixels, int64_t first, int64_t count,
          const std::vector<int32_t> &table, int64_t per_channel, float *planes) {
  const auto *data = static_cast<const char *>(map.data);
  const std::vector<ConvRun> runs = count == 1 ? runs_of(table) : std::vector<ConvRun>{};
#pragma omp parallel for schedule(static) if (channels * per_channel > parallel_work() / 2)
  for (int64_t c = 0; c < channels; ++c) {
    float *to = planes + c * per_channel;
    std::memset(to, 0, sizeof(float) * static_cast<size_t>(per_channel));
    const char *from = data + (first * channels + c) * pixels * type_size(map.type);
    if (count == 1 && 4 * static_cast<int64_t>(runs.size()) < pixels) {
      kernels.copy(from, map.type, runs.data(), static_cast<int64_t>(runs.size()), to);
    } else {
      kernels.pack(from, map.type, channels * pixels, count, pixels, table.data(), to);
    }
  }
}

// Where the results of one grid go: `map` is the caller's [batch, channels, *size].
struct Target {
  Grid grid;
  int64_t channels, first, images;  // images first .. first + images
  const float *bias;
  float *map;

  int64_t pixels() const { return grid.size[0] * grid.size[1]; }
};

void write_band(const ConvKernels &kernels, const Target &t, const ConvBand &band, bool compact, int64_t pitch,
                int64_t channel, const float *z) {
  const Grid &grid = t.grid;
  float *plane = t.map + (t.first * t.channels + channel) * t.pixels();
  const int64_t ldy = t.channels * t.pixels(), wide = grid.count[1];
  if (compact && wide == grid.size[1] && grid.step[0] == 1) {
    kernels.unpack(z, t.images, band.rows * wide, plane + band.first * wide, ldy, 1);
    return;
  }
  for (int64_t r = 0; r < band.rows; ++r) {
    const int64_t row = grid.first[0] + (band.first + r) * grid.step[0];
    kernels.unpack(z + r * (compact ? wide : pitch) * t.images, t.images, wide,
                   plane + row * grid.size[1] + grid.first[1], ldy, grid.step[1]);
  }
}

// The results of one grid: channel c of the target reads list c * step + phase over the planes of its group.
void run_grid(const ConvKernels &kernels, const ConvLists &lists, int64_t step, int64_t phase, const Lattice &lattice,
              const float *planes, int64_t group_stride, int64_t groups, const ConvCut &cut, const Target &target) {
  const int64_t bands = static_cast<int64_t>(cut.bands.size()), per_group = target.channels / groups;
  const int64_t positions = lattice.positions / kernels.lanes + 1;
  const bool parallel = (lists.kept() + target.channels) * positions > parallel_work() / 8;
  // Bands alone if there are enough of them: threads that share a window read it twice.
  const int64_t wanted = parallel ? 4 * omp_get_max_threads() : 1;
  const int64_t fit = std::max<int64_t>(8, kConvBand / cut.room);
  const int64_t high = std::clamp<int64_t>(target.channels / divide_up(wanted, bands), 1, fit);
  const int64_t blocks = divide_up(target.channels, high);
#pragma omp parallel if (parallel)
  {
    const FloatBuffer z(high * cut.room);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < bands * blocks; ++task) {
      const ConvBand &band = cut.bands[static_cast<size_t>(task / blocks)];
      const int64_t first = task % blocks * high, last = std::min(target.channels, first + high);
      for (size_t k = band.chunk; k < band.chunk + band.chunks; ++k) {
        const ConvTile *tiles = cut.tiles.data() + cut.chunks[k].tile;
        for (int64_t c = first; c < last; ++c) {
          kernels.products(lists.get(c * step + phase), target.bias ? target.bias[c] : 0.0f,
                           planes + c / per_group * group_stride + lattice.lead, tiles,
                           static_cast<int64_t>(cut.chunks[k].tiles), z.get() + (c - first) * cut.room);
        }
      }
      for (int64_t c = first; c < last; ++c) {
        write_band(kernels, target, band, cut.compact, lattice.pitch[1], c, z.get() + (c - first) * cut.room);
      }
    }
  }
}

// Rows of planes that one row of outputs reads beside its own.
int64_t halo_of(const std::vector<Tap> &taps, const Lattice &lattice) {
  int64_t low = 0, high = 0;
  for (const Tap &tap : taps) {
    low = std::min(low, tap.shift);
    high = std::max(high, tap.shift);
  }
  return divide_up(high - low, lattice.pitch[1] * lattice.pitch[2]);
}

void check_offsets(int64_t floats) {
  if (floats > INT32_MAX) throw std::length_error("masked_conv2d: a map of one image is too large for 32-bit offsets");
}

}  // namespace

const ConvKernels &conv_kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return conv_kernels_avx512();
  if (isa() == Isa::kAvx2) return conv_kernels_avx2();
#endif
  return conv_kernels_portable();
}

void masked_conv2d(const ConvShape &s, const ConvEntries &v, ConvMap x, const float *bias, float *y) {
  if (s.batch == 0 || s.rows == 0) return;
  const ConvKernels &kernels = conv_kernels();
  if (pointwise(s, x, kernels)) return pointwise_output(s, v, static_cast<const float *>(x.data), bias, y, kernels);
  const ForwardPlan one = plan_forward(geometry_of(s, 1), 1);
  const int64_t most =
      images_at_once(s, s.channels * static_cast<int64_t>(one.planes.size()) * one.lattice.span, kernels.lanes);
  const int64_t group_channels = s.channels / s.groups;
  for (int64_t first = 0; first < s.batch;) {
    const int64_t images = std::min(most, s.batch - first);
    const ForwardPlan plan = plan_forward(geometry_of(s, images), 1);
    const Lattice &lattice = plan.lattice;
    const int64_t grids = static_cast<int64_t>(plan.planes.size()), per_channel = grids * lattice.span;
    check_offsets(group_channels * per_channel);
    const std::vector<int32_t> table = plane_table(lattice, plan.planes);
    const ConvLists lists = forward_lists(v, s, plan);
    const ConvCut cut =
        cut_outputs(s.out[0], s.out[1], lattice.pitch[1], images, s.channels * grids * lattice.pitch[1] * images,
                    halo_of(plan.taps, lattice), kernels);
    const FloatBuffer planes(s.channels * per_channel);
    for (const int64_t end = images == most ? s.batch - s.batch % most : s.batch; first < end; first += images) {
      fill(kernels, x, s.channels, s.pixels(), first, images, table, per_channel, planes.get());
      const int64_t out[3] = {s.out[0], s.out[1], images};
      run_grid(kernels, lists, 1, 0, lattice, planes.get(), group_channels * per_channel, s.groups, cut,
               {whole_grid(out), s.rows, first, images, bias, y});
    }
  }
}

void masked_conv2d_input(const ConvShape &s, const ConvEntries &transposed, ConvMap g, float *x) {
  if (s.batch == 0 || s.channels == 0) return;
  const ConvKernels &kernels = conv_kernels();
  if (pointwise(s, g, kernels)) {
    return pointwise_input(s, transposed, static_cast<const float *>(g.data), x, kernels);
  }
  const BackwardPlan one = plan_backward(geometry_of(s, 1), 1);
  const int64_t most = images_at_once(s, s.rows * one.lattice.span, kernels.lanes);
  const int64_t group_rows = s.rows / s.groups;
  for (int64_t first = 0; first < s.batch;) {
    const int64_t images = std::min(most, s.batch - first);
    const BackwardPlan plan = plan_backward(geometry_of(s, images), 1);
    const Lattice &lattice = plan.lattice;
    check_offsets(group_rows * lattice.span);
    const int64_t out[3] = {s.out[0], s.out[1], images};
    const std::vector<int32_t> table = plane_table(lattice, {whole_grid(out)});
    const ConvLists lists = input_lists(transposed, s, plan);
    const int64_t phases = static_cast<int64_t>(plan.phases.size());
    std::vector<ConvCut> cuts;
    for (const BackwardPhase &part : plan.phases) {
      cuts.push_back(cut_outputs(part.grid.count[0], part.grid.count[1], lattice.pitch[1], images,
                                 s.rows * lattice.pitch[1] * images, halo_of(part.taps, lattice), kernels));
    }
    const FloatBuffer planes(s.rows * lattice.span);
    for (const int64_t end = images == most ? s.batch - s.batch % most : s.batch; first < end; first += images) {
      fill(kernels, g, s.rows, s.out_pixels(), first, images, table, lattice.span, planes.get());
      for (int64_t p = 0; p < phases; ++p) {
        run_grid(kernels, lists, phases, p, lattice, planes.get(), group_rows * lattice.span, s.groups,
                 cuts[static_cast<size_t>(p)],
                 {plan.phases[static_cast<size_t>(p)].grid, s.channels, first, images, nullptr, x});
      }
    }
  }
}

void masked_conv2d_kept(const ConvShape &s, const ConvEntries &v, ConvMap g, ConvMap x, float *out) {
  const int64_t kept = v.kept();
  if (kept == 0) return;
  if (s.batch == 0) {
    std::fill(out, out + kept, 0.0f);
    return;
  }
  const ConvKernels &kernels = conv_kernels();
  if (pointwise(s, x, kernels) && g.type == WeightType::kFloat32 && s.pixels() % kernels.lanes == 0) {
    return pointwise_kept(s, v, static_cast<const float *>(g.data), static_cast<const float *>(x.data), out, kernels);
  }
  const ForwardPlan one = plan_forward(geometry_of(s, 1), 1);
  const int64_t most = images_at_once(
      s, std::max(s.rows, s.channels * static_cast<int64_t>(one.planes.size())) * one.lattice.span, kernels.lanes);
  const int64_t group_rows = s.rows / s.groups, group_channels = s.channels / s.groups;
  for (int64_t first = 0; first < s.batch;) {
    const int64_t images = std::min(most, s.batch - first);
    const ForwardPlan plan = plan_forward(geometry_of(s, images), 1);
    const Lattice &lattice = plan.lattice;
    const int64_t grids = static_cast<int64_t>(plan.planes.size()), per_channel = grids * lattice.span;
    const int64_t pitch = lattice.pitch[1] * images, wide = s.out[1] * images, lanes = kernels.lanes;
    check_offsets(group_channels * per_channel);
    const std::vector<int32_t> table = plane_table(lattice, plan.planes);
    std::vector<int32_t> g_table;  // the positions themselves, zeros between the rows
    for (int64_t h = 0; h < s.out[0]; ++h) {
      for (int64_t w = 0; w < s.out[1]; ++w) g_table.push_back(static_cast<int32_t>(lattice.flat(0, h, w, 0)));
    }
    const int64_t g_span = round_up(lattice.positions, lanes) + lanes;
    const ConvLists lists = forward_lists(v, s, plan);
    // Chunks of rows where rows are whole vectors, else of flat positions: what lies between rows meets zeros of g.
    const bool by_rows = wide % lanes == 0;
    const int64_t reads = s.channels * grids * pitch, halo = halo_of(plan.taps, lattice);
    const int64_t rows = std::min(rows_in_window(reads, halo), s.out[0]);
    std::vector<ConvTile> tiles;
    std::vector<size_t> ends;
    if (by_rows) {
      for (int64_t h = 0; h < s.out[0]; ++h) {
        tiles.push_back({h * pitch, h * pitch, wide / lanes});
        if ((h + 1) % rows == 0 || h + 1 == s.out[0]) ends.push_back(tiles.size());
      }
    } else {
      const int64_t some = round_up(rows * pitch, lanes);
      for (int64_t q = 0; q < lattice.positions; q += some) {
        tiles.push_back({q, q, divide_up(std::min(some, lattice.positions - q), lanes)});
        ends.push_back(tiles.size());
      }
    }
    const bool parallel = kept * (lattice.positions / lanes + 1) > parallel_work() / 8;
    const std::vector<int64_t> ranges = lists.split(parallel ? 2 * omp_get_max_threads() : 1);
    const int64_t parts = static_cast<int64_t>(ranges.size()) - 1;
    const FloatBuffer planes(s.channels * per_channel), gs(s.rows * g_span);
    for (const int64_t end = images == most ? s.batch - s.batch % most : s.batch; first < end; first += images) {
      fill(kernels, x, s.channels, s.pixels(), first, images, table, per_channel, planes.get());
      fill(kernels, g, s.rows, s.out_pixels(), first, images, g_table, g_span, gs.get());
#pragma omp parallel for schedule(dynamic) if (parallel)
      for (int64_t part = 0; part < parts; ++part) {
        for (size_t e = 0; e < ends.size(); ++e) {
          const size_t from = e ? ends[e - 1] : 0;
          for (int64_t r = ranges[static_cast<size_t>(part)]; r < ranges[static_cast<size_t>(part) + 1]; ++r) {
            const float *base = planes.get() + r / group_rows * group_channels * per_channel + lattice.lead;
            kernels.dots(lists.get(r), gs.get() + r * g_span, base, tiles.data() + from,
                         static_cast<int64_t>(ends[e] - from), first > 0 || e > 0, out + lists.begin(r));
          }
        }
      }
    }
  }
}

}  // namespace paikern

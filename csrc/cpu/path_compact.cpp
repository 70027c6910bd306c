#include "path_compact.h"

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "path_few.h"

namespace paikern {
namespace {

constexpr int64_t kMostDepth = int64_t{1} << 16;  // columns are numbered with 16 bits
constexpr double kMostFloats = 0x1p28;            // of the planes of a map, whose offsets have 32 bits
constexpr int64_t kMostLength = 2048;             // positions: the sums of a row stay in L1
// The break-evens against reading everything: 0.07 at 4 positions, 0.12 at 16; for more positions that of scores.
constexpr double kLeastDensity = 0.06, kFewSlope = 0.09 / 16;
constexpr double kMostDensity = 0.2;  // beyond, tiles are as fast, and lists take a third of the weights

// At least as many floats as the planes of a map take.
double planes_bound(const PathGeometry &g) {
  double floats = static_cast<double>(g.channels * g.batch);
  for (int a = 0; a < 3; ++a) {
    floats *= static_cast<double>((g.size[a] + g.out[a] + g.dilation[a] * (g.kernel[a] - 1) + 1) * g.stride[a]);
  }
  return floats;
}

// Where the planes of all columns of a row start.
void to_offsets(const uint16_t *columns, int64_t count, const int32_t *table, int32_t *offsets) {
  for (int64_t i = 0; i < count; ++i) offsets[i] = table[columns[i]];
}

}  // namespace

bool CompactLayer::pays(const PathGeometry &g, const WeightView &w, double density) {
  if (!w.mask || w.power == 0 || g.groups != 1 || g.linear() || g.batch == 0 || g.depth() > kMostDepth) return false;
  if (g.batch * g.pixels() > kMostLength / 2 || planes_bound(g) > kMostFloats) return false;
  const int64_t positions = g.batch * g.out_pixels();
  if (few_shapes(g)) return density < kLeastDensity + kFewSlope * static_cast<double>(positions);
  return density < std::min(kMostDensity, kept_density(positions));
}

CompactLayer::CompactLayer(const PathGeometry &geometry, const WeightView &w)
    : geometry_(geometry), plan_(plan_forward(geometry_, geometry_.batch)), few_(few_shapes(geometry_)) {
  const PathKernels &kernels = path_kernels();
  // A vector is read behind the last position, no more.
  Lattice &lattice = plan_.lattice;
  lattice.span = round_up(lattice.lead + geometry_.batch * lattice.image() + 16, 16);
  length_ = round_up(lattice.positions, kernels.lanes);
  plane_stride_ = static_cast<int64_t>(plan_.planes.size()) * lattice.span;
  const int64_t rows = geometry_.rows, depth = geometry_.depth(), bytes = divide_up(w.numel, 8);
  for (int64_t c = 0; c < geometry_.channels; ++c) {
    for (const Tap &tap : plan_.taps) {
      offsets_.push_back(static_cast<int32_t>(c * plane_stride_ + tap.phase * lattice.span + tap.shift));
    }
  }
  const std::vector<int32_t> table = pixel_table(geometry_);
  const int64_t each = geometry_.out_pixels(), taps = geometry_.taps();
  for (int64_t t = 0; t < taps && few_; ++t) {
    for (int64_t p = 0; p < each; ++p) pixels_.push_back(table[static_cast<size_t>(p * taps + t)]);
  }
  std::vector<int32_t> numbers(static_cast<size_t>(depth) + 16);
  for (int64_t j = 0; j < depth; ++j) numbers[static_cast<size_t>(j)] = static_cast<int32_t>(j);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t bits = 0;
    for (int64_t j = 0; j < depth; j += 57) {
      const int here = static_cast<int>(std::min<int64_t>(57, depth - j));
      bits += __builtin_popcountll(mask_bits(w.mask, bytes, row * depth + j, here));
    }
    starts_.push_back(kept_);
    counts_.push_back(bits);
    kept_ += bits;
  }
  columns_.resize(static_cast<size_t>(kept_));
  values_.resize(static_cast<size_t>(kept_));
#pragma omp parallel if (w.numel > parallel_work())
  {
    const Scratch<int32_t> keys(depth + 16);
    const FloatBuffer kept(depth + 16);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t found = kernels.list_kept(w, row * depth, depth, numbers.data(), keys.get(), kept.get());
      const int64_t start = starts_[static_cast<size_t>(row)];
      for (int64_t i = 0; i < found; ++i) {
        columns_[static_cast<size_t>(start + i)] = static_cast<uint16_t>(keys.get()[i]);
      }
      std::copy_n(kept.get(), found, values_.begin() + start);
    }
  }
}

void CompactLayer::filter(const uint8_t *mask) {
  const PathKernels &kernels = path_kernels();
  const int64_t rows = geometry_.rows, depth = geometry_.depth(), bytes = divide_up(rows * depth, 8);
  int64_t kept = 0;
#pragma omp parallel for schedule(static) reduction(+ : kept) if (kept_ > parallel_work() / 16)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t start = starts_[static_cast<size_t>(row)];
    const int64_t left =
        kernels.filter_kept(columns_.data() + start, values_.data() + start, count(row), mask, bytes, row * depth);
    counts_[static_cast<size_t>(row)] = left;
    kept += left;
  }
  kept_ = kept;
  if (8 * kept < 7 * static_cast<int64_t>(columns_.size())) close_up();
}

// Gives back the room of dropped weights.
void CompactLayer::close_up() {
  std::vector<uint16_t> columns;
  std::vector<float> values;
  columns.reserve(static_cast<size_t>(kept_));
  values.reserve(static_cast<size_t>(kept_));
  for (int64_t row = 0; row < geometry_.rows; ++row) {
    const int64_t start = static_cast<int64_t>(columns.size());
    columns.insert(columns.end(), this->columns(row), this->columns(row) + count(row));
    values.insert(values.end(), this->values(row), this->values(row) + count(row));
    starts_[static_cast<size_t>(row)] = start;
  }
  columns_.swap(columns);
  values_.swap(values);
}

void CompactLayer::forward(const float *x, float *z) const {
  if (few_) return forward_columns(x, z);
  const PathKernels &kernels = path_kernels();
  const Lattice &lattice = plan_.lattice;
  const Grid grid = whole_grid(geometry_.out);
  const FloatBuffer planes(geometry_.channels * plane_stride_ + 16);
  fill_planes(lattice, plan_.planes, geometry_.batch, geometry_.channels, x, planes.get());
  const int64_t rows = geometry_.rows, pixels = geometry_.out_pixels();
#pragma omp parallel if (parallel())
  {
    const Scratch<int32_t> offsets(geometry_.depth());
    const FloatBuffer sums(length_);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      to_offsets(columns(row), count(row), offsets_.data(), offsets.get());
      kernels.gather(offsets.get(), values(row), count(row), planes.get() + lattice.lead, length_, sums.get());
      write_positions(lattice, grid, geometry_.batch, rows, 0, length_, 1, sums.get(), length_, z + row * pixels);
    }
  }
}

// The columns themselves, [depth][positions]: no vector is wider than the positions.
void CompactLayer::fill_columns(const float *x, float *map) const {
  const int64_t taps = geometry_.taps(), width = few_width(), each = geometry_.out_pixels(),
                pixels = geometry_.pixels();
  const int64_t channels = geometry_.channels;
#pragma omp parallel if (channels * taps * width > parallel_work() / 8)
  {
    const FloatBuffer padded(pixels + 1);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < channels; ++c) {
      float *to = map + c * taps * width;
      std::memset(to, 0, sizeof(float) * static_cast<size_t>(taps * width));
      for (int64_t n = 0; n < geometry_.batch; ++n) {
        std::memcpy(padded.get(), x + (n * channels + c) * pixels, sizeof(float) * static_cast<size_t>(pixels));
        padded.get()[pixels] = 0.0f;
        for (int64_t t = 0; t < taps; ++t) {
          const int32_t *pixel = pixels_.data() + t * each;
          for (int64_t p = 0; p < each; ++p) to[t * width + n * each + p] = padded.get()[pixel[p]];
        }
      }
    }
  }
}

void CompactLayer::forward_columns(const float *x, float *z) const {
  const PathKernels &kernels = path_kernels();
  const int64_t width = few_width(), each = geometry_.out_pixels(), rows = geometry_.rows;
  const FloatBuffer map(geometry_.depth() * width);
  fill_columns(x, map.get());
#pragma omp parallel if (parallel())
  {
    const FloatBuffer sums(16);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      kernels.gather_columns(columns(row), values(row), count(row), map.get(), width, sums.get());
      for (int64_t n = 0; n < geometry_.batch; ++n) {
        std::memcpy(z + (n * rows + row) * each, sums.get() + n * each, sizeof(float) * static_cast<size_t>(each));
      }
    }
  }
}

void CompactLayer::backward(const float *g, float *gx) const {
  const int64_t channels = geometry_.channels;
  const int64_t parts = parallel() ? std::min<int64_t>(omp_get_max_threads(), channels) : 1;
  const FloatBuffer g_maps(few_ ? geometry_.rows * few_width() : geometry_.rows * plan_.lattice.span + 16);
  if (few_) {
    fill_rows(g, g_maps.get());
  } else {
    fill_planes(plan_.lattice, {whole_grid(geometry_.out)}, geometry_.batch, geometry_.rows, g, g_maps.get());
  }
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(parts)) if (parts > 1)
  for (int64_t part = 0; part < parts; ++part) {  // each its own channels: rows add to them in ascending order
    const int64_t c0 = channels * part / parts, c1 = channels * (part + 1) / parts;
    if (few_) {
      backward_columns(c0, c1, g_maps.get(), gx);
    } else {
      backward_planes(c0, c1, g_maps.get(), gx);
    }
  }
}

// g [batch, rows, positions] to whole vectors of four, a row after the other.
void CompactLayer::fill_rows(const float *g, float *to) const {
  const int64_t each = geometry_.out_pixels(), width = few_width(), rows = geometry_.rows;
  std::memset(to, 0, sizeof(float) * static_cast<size_t>(rows * width));
  for (int64_t n = 0; n < geometry_.batch; ++n) {
    for (int64_t row = 0; row < rows; ++row) {
      std::memcpy(to + row * width + n * each, g + (n * rows + row) * each, sizeof(float) * static_cast<size_t>(each));
    }
  }
}

// Sums of every column and position, then the columns of a channel onto its pixels: what a row adds to one pixel
// through two taps would wait for itself in shifted planes (0.57 against 0.25 ms for 236,000 weights over 4 x 4
// positions).
void CompactLayer::backward_columns(int64_t c0, int64_t c1, const float *g, float *gx) const {
  const PathKernels &kernels = path_kernels();
  const int64_t taps = geometry_.taps(), width = few_width(), each = geometry_.out_pixels(),
                pixels = geometry_.pixels();
  const int64_t numel = (c1 - c0) * taps * width;
  const FloatBuffer total(numel), range(numel), map(pixels + 1);
  for (int64_t first = 0; first < geometry_.rows; first += kFewRange) {
    float *const sums = first == 0 ? total.get() : range.get();
    std::memset(sums, 0, sizeof(float) * static_cast<size_t>(numel));
    for (int64_t row = first; row < std::min(geometry_.rows, first + kFewRange); ++row) {
      const Part part = columns_of(row, c0, c1);
      kernels.scatter_columns(part.columns, part.values, part.count, g + row * width, width, sums - c0 * taps * width);
    }
    for (int64_t i = 0; i < numel && first > 0; ++i) total.get()[i] += sums[i];
  }
  const float *const base = total.get() - c0 * taps * width;
  for (int64_t c = c0; c < c1; ++c) {
    for (int64_t n = 0; n < geometry_.batch; ++n) {
      std::memset(map.get(), 0, sizeof(float) * static_cast<size_t>(pixels + 1));
      for (int64_t t = 0; t < taps; ++t) {
        const float *from = base + (c * taps + t) * width + n * each;
        const int32_t *pixel = pixels_.data() + t * each;
        for (int64_t p = 0; p < each; ++p) map.get()[pixel[p]] += from[p];
      }
      std::memcpy(gx + (n * geometry_.channels + c) * pixels, map.get(), sizeof(float) * static_cast<size_t>(pixels));
    }
  }
}

void CompactLayer::backward_planes(int64_t c0, int64_t c1, const float *g_planes, float *gx) const {
  const PathKernels &kernels = path_kernels();
  const Lattice &lattice = plan_.lattice;
  const int64_t channels = geometry_.channels, pixels = geometry_.pixels();
  const bool every =
      static_cast<int64_t>(plan_.planes.size()) == geometry_.stride[0] * geometry_.stride[1] * geometry_.stride[2];
  const FloatBuffer planes((c1 - c0) * plane_stride_ + 16);
  std::memset(planes.get(), 0, sizeof(float) * static_cast<size_t>((c1 - c0) * plane_stride_));
  float *const base = planes.get() + lattice.lead - c0 * plane_stride_;
  const Scratch<int32_t> offsets(geometry_.depth());
  for (int64_t row = 0; row < geometry_.rows; ++row) {
    const Part part = columns_of(row, c0, c1);
    to_offsets(part.columns, part.count, offsets_.data(), offsets.get());
    kernels.scatter(offsets.get(), part.values, part.count, g_planes + row * lattice.span + lattice.lead, length_,
                    base);
  }
  for (int64_t n = 0; n < geometry_.batch; ++n) {
    float *map = gx + n * channels * pixels;
    if (!every) std::memset(map + c0 * pixels, 0, sizeof(float) * static_cast<size_t>((c1 - c0) * pixels));
    for (int64_t c = c0; c < c1; ++c) {
      for (size_t p = 0; p < plan_.planes.size(); ++p) {
        const Grid &grid = plan_.planes[p];
        const float *plane = base + c * plane_stride_ + static_cast<int64_t>(p) * lattice.span;
        for (int64_t d = 0; d < grid.count[0]; ++d) {
          const int64_t line = (grid.first[0] + d * grid.step[0]) * grid.size[1] + grid.first[1];
          kernels.write_rows(plane + lattice.flat(n, d, 0, 0), lattice.pitch[2], grid.step[2], grid.count[1],
                             grid.count[2], map + c * pixels + line * grid.size[2] + grid.first[2],
                             grid.step[1] * grid.size[2]);
        }
      }
    }
  }
}

// The weights of a row that read channels c0 .. c1.
CompactLayer::Part CompactLayer::columns_of(int64_t row, int64_t c0, int64_t c1) const {
  const uint16_t *all = columns(row), *end = all + count(row);
  const int64_t taps = geometry_.taps();
  const uint16_t *from = c0 == 0 ? all : std::lower_bound(all, end, c0 * taps);
  const uint16_t *to = c1 == geometry_.channels ? end : std::lower_bound(from, end, c1 * taps);
  return {from, values(row) + (from - all), to - from};
}

void CompactLayer::scores(const float *x, const float *g, const Sink &sink) const {
  const PathKernels &kernels = path_kernels();
  const Lattice &lattice = plan_.lattice;
  const int64_t rows = geometry_.rows, width = few_width();
  const int64_t g_step = few_ ? width : lattice.span;
  const FloatBuffer x_map((few_ ? geometry_.depth() * width : geometry_.channels * plane_stride_) + 16);
  const FloatBuffer g_map(rows * g_step + 16);
  if (few_) {
    fill_columns(x, x_map.get());
    fill_rows(g, g_map.get());
  } else {
    fill_planes(lattice, plan_.planes, geometry_.batch, geometry_.channels, x, x_map.get());
    fill_planes(lattice, {whole_grid(geometry_.out)}, geometry_.batch, rows, g, g_map.get());
  }
  const int64_t blocks = divide_up(rows, 8);
#pragma omp parallel if (parallel())
  {
    const Scratch<int32_t> offsets(few_ ? 0 : geometry_.depth());
    const FloatBuffer q(geometry_.depth() + 16);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t row = 8 * block; row < std::min(rows, 8 * block + 8); ++row) {
        const int64_t kept = count(row);
        if (kept == 0) continue;
        const float *g_row = g_map.get() + row * g_step, *v = values(row);
        if (few_) {
          kernels.score_columns(columns(row), v, kept, x_map.get(), width, g_row, q.get());
        } else {
          to_offsets(columns(row), kept, offsets_.data(), offsets.get());
          kernels.dots(g_row + lattice.lead, 0, 1, x_map.get() + lattice.lead, offsets.get(), kept, length_, q.get(),
                       0);
          for (int64_t i = 0; i < kept; ++i) q.get()[i] *= v[i];
        }
        sink(row, columns(row), q.get(), kept);
      }
    }
  }
}

}  // namespace paikern

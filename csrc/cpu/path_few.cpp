#include "path_few.h"

#include <algorithm>
#include <cstring>

#include "path_compact.h"

namespace paikern {
namespace {

constexpr int64_t kRows = 8;     // decoded together
constexpr int64_t kChunk = 256;  // columns of them: 8 KB, and 16 KB of columns at 16 positions
constexpr int64_t kMostPositions = 16, kLeastRows = 32, kLeastDepth = 128;

class Columns {
 public:
  explicit Columns(const PathGeometry &g)
      : g_(g),
        lanes_(path_kernels().lanes),
        positions_(g.batch * g.out_pixels()),
        vectors_(divide_up(g.depth(), lanes_)),
        table_(pixel_table(g)) {}

  int64_t positions() const { return positions_; }
  int64_t vectors() const { return vectors_; }
  int64_t ld() const { return vectors_ * lanes_; }
  int64_t floats() const { return ld() * positions_; }

  // columns <- the map x, 0 beyond the depth
  void fill(const float *x, float *columns) const {
    const int64_t taps = g_.taps(), each = g_.out_pixels();
    std::memset(columns + (vectors_ - 1) * positions_ * lanes_, 0,
                sizeof(float) * static_cast<size_t>(positions_ * lanes_));
#pragma omp parallel for schedule(static) if (floats() > parallel_work() / 8)
    for (int64_t c = 0; c < g_.channels; ++c) {
      float pixels[kMostPixels + 1];
      for (int64_t n = 0; n < g_.batch; ++n) {
        std::memcpy(pixels, x + (n * g_.channels + c) * g_.pixels(), sizeof(float) * static_cast<size_t>(g_.pixels()));
        pixels[g_.pixels()] = 0.0f;
        for (int64_t t = 0; t < taps; ++t) {
          float *to = columns + place(c * taps + t) + n * each * lanes_;
          for (int64_t p = 0; p < each; ++p) to[p * lanes_] = pixels[table_[static_cast<size_t>(p * taps + t)]];
        }
      }
    }
  }

  // The map gx <- the sum of the tables in order, made in the first; each pixel is the sum of its (position, tap) in
  // order of taps.
  void fold(float *tables, int64_t count, float *gx) const {
    const int64_t taps = g_.taps(), each = g_.out_pixels(), all = floats();
    constexpr int64_t kPiece = 4096;
#pragma omp parallel for schedule(static) if (count * all > parallel_work() / 8)
    for (int64_t start = 0; start < all; start += kPiece) {
      const int64_t end = std::min(all, start + kPiece);
      for (int64_t i = 1; i < count; ++i) {
        const float *from = tables + i * all;
        for (int64_t k = start; k < end; ++k) tables[k] += from[k];
      }
    }
#pragma omp parallel for schedule(static) if (all > parallel_work() / 8)
    for (int64_t c = 0; c < g_.channels; ++c) {
      float pixels[kMostPixels + 1];
      for (int64_t n = 0; n < g_.batch; ++n) {
        std::memset(pixels, 0, sizeof(pixels));
        for (int64_t t = 0; t < taps; ++t) {
          const float *from = tables + place(c * taps + t) + n * each * lanes_;
          for (int64_t p = 0; p < each; ++p) pixels[table_[static_cast<size_t>(p * taps + t)]] += from[p * lanes_];
        }
        std::memcpy(gx + (n * g_.channels + c) * g_.pixels(), pixels, sizeof(float) * static_cast<size_t>(g_.pixels()));
      }
    }
  }

  static constexpr int64_t kMostPixels = 256;

 private:
  int64_t place(int64_t j) const { return j / lanes_ * positions_ * lanes_ + j % lanes_; }

  const PathGeometry &g_;
  const int64_t lanes_, positions_, vectors_;
  const std::vector<int32_t> table_;
};

// Columns j .. j + kChunk of rows row .. row + rows of V; what is missing is 0. Returns how many vectors there are.
int64_t decode_chunk(const WeightView &w, int64_t depth, int64_t row, int64_t rows, int64_t j, float *v) {
  const PathKernels &kernels = path_kernels();
  const int64_t count = std::min(kChunk, depth - j);
  for (int64_t r = 0; r < kRows; ++r) {
    if (r < rows) {
      const int64_t start = (row + r) * depth + j;
      prefetch_weights(w, start + kChunk, kChunk);
      kernels.decode(w, start, count, v + r * kChunk);
    } else {
      std::memset(v + r * kChunk, 0, sizeof(float) * static_cast<size_t>(kChunk));
    }
  }
  return divide_up(count, kernels.lanes);
}

}  // namespace

bool few_shapes(const PathGeometry &g) {
  if (g.groups != 1 || g.linear() || g.batch * g.out_pixels() > kMostPositions) return false;
  return g.rows >= kLeastRows && g.depth() >= kLeastDepth && g.pixels() <= Columns::kMostPixels;
}

bool few_positions(const PathGeometry &g, const WeightView &w, double density) {
  return w.power != 0 && few_shapes(g) && !CompactLayer::pays(g, w, density);
}

void few_forward(const PathGeometry &g, const WeightView &w, const float *x, float *z) {
  const PathKernels &kernels = path_kernels();
  const Columns columns(g);
  const int64_t positions = columns.positions(), each = g.out_pixels(), depth = g.depth();
  const FloatBuffer map(columns.floats());
  columns.fill(x, map.get());
  const int64_t blocks = divide_up(g.rows, kRows);
#pragma omp parallel if (g.rows * depth > parallel_work() / 8)
  {
    const FloatBuffer v(kRows * kChunk), sums(positions * kRows * kernels.lanes), out(positions * kRows);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = b * kRows, rows = std::min(kRows, g.rows - row);
      std::memset(sums.get(), 0, sizeof(float) * static_cast<size_t>(positions * kRows * kernels.lanes));
      for (int64_t j = 0; j < depth; j += kChunk) {
        const int64_t vectors = decode_chunk(w, depth, row, rows, j, v.get());
        kernels.few_dots(v.get(), kChunk, map.get() + j * positions, positions, vectors, sums.get());
      }
      kernels.few_fold(sums.get(), positions * kRows, out.get());
      for (int64_t p = 0; p < positions; ++p) {
        for (int64_t r = 0; r < rows; ++r) {
          z[(p / each * g.rows + row + r) * each + p % each] = out.get()[p * kRows + r];
        }
      }
    }
  }
}

void few_backward(const PathGeometry &g, const WeightView &w, const float *x, const float *grad, float *gx,
                  const FewSink &sink) {
  const PathKernels &kernels = path_kernels();
  const Columns columns(g);
  const int64_t positions = columns.positions(), each = g.out_pixels(), depth = g.depth(), ld = columns.ld();
  const FloatBuffer map(x ? columns.floats() : 0);
  if (x) columns.fill(x, map.get());
  const int64_t ranges = divide_up(g.rows, kFewRange);
  const FloatBuffer tables(gx ? ranges * columns.floats() : 0);
#pragma omp parallel if (g.rows * depth > parallel_work() / 8)
  {
    const FloatBuffer v(kRows * kChunk), scores(x ? kRows * ld : 0), factors(positions * kRows);
#pragma omp for schedule(dynamic)
    for (int64_t range = 0; range < ranges; ++range) {
      float *table = gx ? tables.get() + range * columns.floats() : nullptr;
      if (table) std::memset(table, 0, sizeof(float) * static_cast<size_t>(columns.floats()));
      const int64_t last = std::min(g.rows, (range + 1) * kFewRange);
      for (int64_t row = range * kFewRange; row < last; row += kRows) {
        const int64_t rows = std::min(kRows, last - row);
        for (int64_t p = 0; p < positions; ++p) {
          for (int64_t r = 0; r < kRows; ++r) {
            factors.get()[p * kRows + r] = r < rows ? grad[(p / each * g.rows + row + r) * each + p % each] : 0.0f;
          }
        }
        for (int64_t j = 0; j < depth; j += kChunk) {
          const int64_t vectors = decode_chunk(w, depth, row, rows, j, v.get());
          kernels.few_sweep(v.get(), kChunk, factors.get(), x ? map.get() + j * positions : nullptr, positions, vectors,
                            table ? table + j * positions : nullptr, x ? scores.get() + j : nullptr, ld);
        }
        if (!x) continue;
        for (int64_t r = 1; r < rows && ld > depth; ++r) {  // side by side
          std::memmove(scores.get() + r * depth, scores.get() + r * ld, sizeof(float) * static_cast<size_t>(depth));
        }
        sink(row, rows, scores.get());
      }
    }
  }
  if (gx) columns.fold(tables.get(), ranges, gx);
}

}  // namespace paikern

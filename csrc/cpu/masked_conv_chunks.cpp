#include "masked_conv_chunks.h"

#include <algorithm>

#include "path_plan.h"

namespace paikern {
namespace {

constexpr int64_t kPixels = 128;      // of an image at least that a band writes
constexpr int64_t kPositions = 2048;  // of a band without images side by side

constexpr int64_t kTileCost = 3;  // vectors that another tile costs

int64_t band_rows(int64_t high, int64_t wide, int64_t images, int64_t lanes) {
  if (images == 1) return std::clamp<int64_t>(kPositions / wide, 1, high);
  int64_t rows = std::clamp<int64_t>(divide_up(kPixels, wide), 1, high);
  // Whole cache lines of every image, unless that takes many more rows.
  for (int64_t more = rows; more < 2 * rows && more <= high; ++more) {
    if (more * wide % lanes == 0) return more;
  }
  return 2 * rows > high ? high : rows;
}

}  // namespace

int64_t rows_in_window(int64_t reads, int64_t halo) {
  return std::max<int64_t>(1, kConvWindow / std::max<int64_t>(reads, 1) - halo);
}

ConvCut cut_outputs(int64_t high, int64_t wide, int64_t pitch, int64_t images, int64_t reads, int64_t halo,
                    const ConvKernels &kernels) {
  ConvCut cut;
  const int64_t lanes = kernels.lanes, vectors = kernels.vectors;
  // A tile of few vectors waits for its sums: 14 rows of one vector took 2.6 times as long as two tiles of 7.
  const auto cost = [&](int64_t floats) {
    const int64_t all = divide_up(floats, lanes);
    return all + kTileCost * divide_up(all, vectors);
  };
  cut.compact = high * cost(wide * images) <= cost(((high - 1) * pitch + wide) * images);
  const int64_t rows = band_rows(high, wide, images, lanes);
  const int64_t some = std::min(rows, rows_in_window(reads, halo));
  int64_t columns = wide;
  if (cut.compact && some == 1 && reads * (1 + halo) > kConvWindow) {
    const int64_t parts = divide_up(reads * (1 + halo), kConvWindow);
    columns = std::min(wide, round_up(divide_up(wide, parts) * images, lanes * vectors) / images);
  }
  const auto tile = [&](int64_t at, int64_t to, int64_t count) {
    // Tiles of about equal size: 7 + 7 vectors rather than 8 + 6.
    const int64_t all = divide_up(count, lanes), parts = divide_up(all, vectors);
    for (int64_t p = 0, v = 0; p < parts; ++p) {
      const int64_t next = all * (p + 1) / parts;
      cut.tiles.push_back({at + v * lanes, to + v * lanes, next - v});
      v = next;
    }
  };
  for (int64_t first = 0; first < high; first += rows) {
    const int64_t last = std::min(high, first + rows);
    const size_t chunk = cut.chunks.size();
    for (int64_t h = first; h < last; h += some) {
      const int64_t end = std::min(last, h + some);
      for (int64_t from = 0; from < wide; from += columns) {
        const size_t start = cut.tiles.size();
        const int64_t across = std::min(columns, wide - from);
        if (cut.compact) {
          for (int64_t r = h; r < end; ++r) {
            tile((r * pitch + from) * images, ((r - first) * wide + from) * images, across * images);
          }
        } else {
          tile(h * pitch * images, (h - first) * pitch * images, ((end - h - 1) * pitch + wide) * images);
        }
        cut.chunks.push_back({start, cut.tiles.size() - start});
      }
    }
    cut.bands.push_back({first, last - first, chunk, cut.chunks.size() - chunk});
  }
  cut.room = rows * (cut.compact ? wide : pitch) * images + 2 * lanes;
  return cut;
}

}  // namespace paikern

#include "path_score_tiles.h"

#include <limits>

namespace paikern {
namespace {

constexpr float kExcluded = -std::numeric_limits<float>::infinity();

}  // namespace

KeptScores::KeptScores(const PathGeometry &geometry, const OuterMaps &maps, const WeightView &w)
    : geometry_(geometry), maps_(maps), w_(w), offsets_(kColumns + 16), values_(kColumns + 16), q_(kColumns + 16) {}

void KeptScores::run(int64_t row, int64_t j0, int64_t count, float pruned, float *out) const {
  const PathKernels &kernels = path_kernels();
  const int64_t group = row / geometry_.group_rows();
  for (int64_t end = j0 + count; j0 < end; j0 += kColumns, out += kColumns) {
    const int64_t here = std::min(kColumns, end - j0), start = row * geometry_.depth() + j0;
    const int64_t kept = kernels.list_kept(w_, start, here, maps_.offsets() + j0, offsets_.get(), values_.get());
    if (kept > 0) {
      kernels.dots(maps_.g_plane(row), 0, 1, maps_.x_plane(group), offsets_.get(), kept, maps_.length(), q_.get(), 0);
    }
    for (int64_t i = 0; i < kept; ++i) values_.get()[i] *= q_.get()[i];
    kernels.expand(w_, start, here, values_.get(), pruned, out);
  }
}

// Values do not depend on how tiles are cut, so these are the bits of path_score.
void PathScoreTiles::fill(int64_t start, int64_t count, float *out) const {
  const int64_t columns = geometry_.depth(), rows = geometry_.group_rows(), end = start + count;
  const int64_t first_row = start / columns, last_row = (end - 1) / columns + 1;
  if (maps_.kept_only()) {
    const KeptScores kept(geometry_, maps_, w_);
    for (int64_t row = first_row; row < last_row; ++row) {
      const int64_t from = std::max(row * columns, start), to = std::min((row + 1) * columns, end);
      kept.run(row, from - row * columns, to - from, kExcluded, out + (from - start));
    }
    return;
  }
  const OuterTiles::Memory memory = tiles_.memory(last_row - first_row);
  const auto sink = [&](int64_t row, int64_t tile_rows, int64_t j0, int64_t width, const float *q, int64_t ld) {
    for (int64_t r = 0; r < tile_rows; ++r) {
      const int64_t begin = (row + r) * columns + j0;
      const int64_t from = std::max(begin, start), to = std::min(begin + width, end);
      if (from < to)
        tiles_.kernels.score(w_, from, to - from, q + r * ld + (from - begin), kExcluded, out + (from - start));
    }
  };
  // A unit of columns at a time: of the first and last row only the units inside the range are made.
  const int64_t step = std::min(tiles_.width, divide_up(512, tiles_.unit) * tiles_.unit);
  for (int64_t j0 = 0; j0 < columns; j0 += step) {
    const int64_t width = std::min(step, columns - j0);
    const int64_t from = first_row + (first_row * columns + j0 + width <= start);
    const int64_t to = last_row - ((last_row - 1) * columns + j0 >= end);
    for (int64_t row = from; row < to;) {
      const int64_t group = row / rows, first = row - group * rows, last = std::min(rows, to - group * rows);
      tiles_.run(group, first, last, j0, width, memory, sink);
      row += last - first;
    }
  }
}

void PathScoreTiles::sample(int64_t start, int64_t count, float *out) const {
  float q[64];
  const int64_t columns = geometry_.depth(), bytes = (w_.numel + 7) / 8;
  for (int64_t done = 0; done < count; done += 64) {
    const int64_t n = std::min<int64_t>(64, count - done);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = start + done + i;
      const bool kept = w_.mask == nullptr || mask_bits(w_.mask, bytes, at, 1) != 0;
      q[i] = kept ? maps_.nearly(at / columns, at % columns) : 0.0f;
    }
    tiles_.kernels.score(w_, start + done, n, q, kExcluded, out + done);
  }
}

}  // namespace paikern

#include "path_score_tiles.h"

#include <limits>

namespace paikern {
namespace {

constexpr float kExcluded = -std::numeric_limits<float>::infinity();

}  // namespace

// Whole rows around the range; what lies outside of it is dropped. Values do not depend on how tiles are cut, so these
// are the bits of path_score.
void PathScoreTiles::fill(int64_t start, int64_t count, float *out) const {
  const int64_t columns = geometry_.depth(), rows = geometry_.group_rows(), end = start + count;
  const int64_t first_row = start / columns, last_row = (end - 1) / columns + 1;
  const OuterTiles::Memory memory = tiles_.memory(round_up(last_row - first_row, tiles_.kernels.tile_rows));
  const auto sink = [&](int64_t row, int64_t tile_rows, int64_t j0, int64_t width, const float *q, int64_t ld) {
    for (int64_t r = 0; r < tile_rows; ++r) {
      const int64_t begin = (row + r) * columns + j0;
      const int64_t from = std::max(begin, start), to = std::min(begin + width, end);
      if (from < to)
        tiles_.kernels.score(w_, from, to - from, q + r * ld + (from - begin), kExcluded, out + (from - start));
    }
  };
  for (int64_t group = first_row / rows; group * rows < last_row; ++group) {
    const int64_t first = std::max<int64_t>(first_row - group * rows, 0),
                  last = std::min(last_row - group * rows, rows);
    for (int64_t j0 = 0; j0 < columns; j0 += tiles_.width) {
      tiles_.run(group, first, last, j0, std::min(tiles_.width, columns - j0), memory, sink);
    }
  }
}

void PathScoreTiles::sample(int64_t start, int64_t count, float *out) const {
  float q[64];
  const int64_t columns = geometry_.depth();
  for (int64_t done = 0; done < count; done += 64) {
    const int64_t n = std::min<int64_t>(64, count - done);
    for (int64_t i = 0; i < n; ++i) q[i] = maps_.nearly((start + done + i) / columns, (start + done + i) % columns);
    tiles_.kernels.score(w_, start + done, n, q, kExcluded, out + done);
  }
}

}  // namespace paikern

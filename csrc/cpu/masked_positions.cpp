// Where the kept weights are: from the bits of a mask to 16-bit columns, and from those to the transpose.
#include <algorithm>
#include <vector>

#include "masked_linear.h"
#include "path_plan.h"

namespace paikern {
namespace {

// Calls visit(column) for the bits set among columns first .. last of a row that starts at bit `start`.
template <class Visit>
void each_kept(const uint8_t *bits, int64_t bytes, int64_t start, int64_t first, int64_t last, Visit visit) {
  constexpr int kWord = 56;
  for (int64_t c = first; c < last; c += kWord) {
    const int count = static_cast<int>(std::min<int64_t>(kWord, last - c));
    for (uint64_t word = mask_bits(bits, bytes, start + c, count); word; word &= word - 1) {
      visit(c + __builtin_ctzll(word));
    }
  }
}

}  // namespace

void list_positions(const uint8_t *bits, int64_t rows, int64_t columns, int64_t panel, uint16_t *positions,
                    int32_t *starts) {
  constexpr int kWord = 56;
  const int64_t bytes = (rows * columns + 7) / 8, panels = divide_up(columns, panel);
  const bool parallel = rows * columns > parallel_work();
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t p = 0; p < panels; ++p) {
      int32_t kept = 0;
      const int64_t last = std::min(columns, (p + 1) * panel);
      for (int64_t c = p * panel; c < last; c += kWord) {
        const int count = static_cast<int>(std::min<int64_t>(kWord, last - c));
        kept += __builtin_popcountll(mask_bits(bits, bytes, r * columns + c, count));
      }
      starts[r * panels + p + 1] = kept;
    }
  }
  starts[0] = 0;
  for (int64_t i = 0; i < rows * panels; ++i) starts[i + 1] += starts[i];
  if (!positions) return;
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t r = 0; r < rows; ++r) {
    uint16_t *to = positions + starts[r * panels];
    each_kept(bits, bytes, r * columns, 0, columns, [&](int64_t c) { *to++ = static_cast<uint16_t>(c); });
  }
}

void transpose_positions(const PackedView &v, int64_t panel, uint16_t *positions, int32_t *starts, int32_t *source) {
  const int64_t panels = divide_up(v.rows, panel), count = v.columns * panels;
  // Counts, then their running sum, then entries in row order: a stable sort by (column, row).
  std::fill(starts, starts + count + 1, 0);
  const auto each = [&](auto visit) {
    for (int64_t r = 0; r < v.rows; ++r) {
      for (int64_t p = 0; p < v.panels(); ++p) {
        const int64_t base = p * v.panel / kMaskedColumns * kMaskedColumns;
        const int32_t end = v.starts[r * v.panels() + p + 1];
        for (int32_t i = v.starts[r * v.panels() + p]; i < end; ++i) visit(r, base + v.positions[i], i);
      }
    }
  };
  each([&](int64_t r, int64_t c, int32_t) { ++starts[c * panels + r / panel + 1]; });
  for (int64_t i = 0; i < count; ++i) starts[i + 1] += starts[i];
  std::vector<int32_t> next(starts, starts + count);
  each([&](int64_t r, int64_t c, int32_t i) {
    const int32_t to = next[static_cast<size_t>(c * panels + r / panel)]++;
    positions[to] = static_cast<uint16_t>(r);
    source[to] = i;
  });
}

}  // namespace paikern

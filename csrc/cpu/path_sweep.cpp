#include "path_sweep.h"

#include <algorithm>
#include <cstring>

#include "path_matvec.h"
#include "path_plan.h"
#include "subnormals.h"

namespace paikern {
namespace {

// Writes `count` bits at bit `at`. Rows that do not start on a byte share one with their neighbours, which another
// thread may be writing: their ends are added to bytes that were zero.
void place(const uint64_t *words, int64_t count, int64_t at, bool shared, uint8_t *bits) {
  uint8_t *out = bits + (at >> 3);
  if (!shared) {
    std::memcpy(out, words, static_cast<size_t>(count >> 3));
    return;
  }
  const int shift = static_cast<int>(at & 7);
  const int64_t last = (count + shift - 1) / 64;
  uint64_t carry = 0;
  for (int64_t n = 0; n <= last; ++n) {
    const uint64_t word = 64 * n < count ? words[n] : 0;
    uint64_t moved = word << shift | carry;
    carry = shift == 0 ? 0 : word >> (64 - shift);
    if (n != 0 && n != last) {
      std::memcpy(out + 8 * n, &moved, 8);
      continue;
    }
    for (int64_t byte = 8 * n; moved != 0; ++byte, moved >>= 8) {
      if ((moved & 0xff) != 0) __atomic_fetch_or(out + byte, static_cast<uint8_t>(moved), __ATOMIC_RELAXED);
    }
  }
}

// Rows first .. last, columns j0 .. j1; returns how many bits are set.
int64_t sweep_range(SweepRows rows, int64_t first, int64_t last, uint8_t *bits, SweepSink &sink) {
  const Scratch<float> scores(SweepFound::kRoom + SweepFound::kSlack);
  const Scratch<int64_t> positions(SweepFound::kRoom + SweepFound::kSlack);
  const PathKernels &kernels = path_kernels();
  SweepFound found;
  found.scores = scores.get();
  found.positions = positions.get();
  found.count = found.set = 0;
  const int64_t columns = rows.layer->columns, width = rows.j1 - rows.j0;
  for (rows.row = first; rows.row < last; rows.row += rows.rows) {
    rows.rows = rows.row + kSweepRows <= last ? kSweepRows : 1;
    kernels.sweep_rows(rows, found);
    for (int64_t r = 0; r < rows.rows; ++r) {
      place(found.above[r], width, (rows.row + r) * columns + rows.j0, columns % 8 != 0, bits);
    }
    if (found.count + kSweepRows * kSweepColumns > SweepFound::kRoom || rows.row + rows.rows == last) {
      if (found.count > 0) sink.take(found.scores, found.positions, found.count);
      found.count = 0;
    }
  }
  return found.set;
}

}  // namespace

int64_t path_sweep(const SweepLayer &layer, const SweepBand &band, uint8_t *bits, float *x, SweepSink &sink) {
  const int64_t rows = layer.rows, columns = layer.columns;
  const int64_t chunks = divide_up(rows, kSumRows), blocks = divide_up(columns, kSweepColumns);
  const int64_t stride = round_up(columns, 16) + 16;
  const bool parallel = rows * columns > parallel_work();
  const SubnormalsCount outside;
  const FloatBuffer tables(x == nullptr ? 0 : chunks * stride);
  if (columns % 8 != 0) std::memset(bits, 0, static_cast<size_t>((rows * columns + 7) / 8));
  int64_t above = 0;
#pragma omp parallel for schedule(dynamic) reduction(+ : above) if (parallel)
  for (int64_t task = 0; task < chunks * blocks; ++task) {
    const SubnormalsCount inside;
    const int64_t chunk = task / blocks, j0 = task % blocks * kSweepColumns, j1 = std::min(columns, j0 + kSweepColumns);
    float unused[kSweepColumns];
    float *sums = x == nullptr ? unused : tables.get() + chunk * stride + j0;
    std::memset(sums, 0, sizeof(float) * static_cast<size_t>(round_up(j1 - j0, 16)));
    above += sweep_range({&layer, band, 0, 0, j0, j1, sums}, chunk * kSumRows, std::min(rows, (chunk + 1) * kSumRows),
                         bits, sink);
  }
  if (x != nullptr) add_tables(tables.get(), chunks, stride, columns, x);
  return above;
}

}  // namespace paikern

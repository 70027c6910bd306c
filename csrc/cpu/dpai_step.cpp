// The fused DPaI update: q tile by tile (path_outer.h), flags from the tile and the mask bits, s
// (and Adam's m, v) read and written once. 8 bytes a weight for ascent and 24 with Adam, against 40
// and more for a step written in torch. Source: DPaI poster, line 8 to 12; specification section 4.
#include <mutex>

#include "path_outer.h"

namespace paikern {
namespace {

// Liveness bits of the weights of columns j0 .. j0 + count when nodes are the channels of the
// column map.
void live_words(const PathGeometry &geometry, const DpaiState &state, int64_t group, int64_t j0, int64_t count,
                std::vector<uint64_t> &words) {
  const int64_t taps = geometry.taps();
  words.assign(static_cast<size_t>(divide_up(count, 64)), 0);
  const uint8_t *live = state.node_live + group * geometry.group_channels() + j0 / taps;
  for (int64_t j = 0; j < count; ++j) {
    if (live[j / taps]) words[static_cast<size_t>(j / 64)] |= uint64_t{1} << (j % 64);
  }
}

// One tile: rows of `count` weights whose q values are ld floats apart.
DpaiCounts update_tile(const PathGeometry &geometry, const DpaiState &state, const DpaiRule &rule, int64_t row,
                       int64_t rows, int64_t j0, int64_t count, const float *q, int64_t ld) {
  const PathKernels &kernels = path_kernels();
  std::vector<uint64_t> words(static_cast<size_t>(2 * divide_up(count, 64))), live;
  if (state.node_is_channel) live_words(geometry, state, row / geometry.group_rows(), j0, count, live);
  DpaiCounts counts{};
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t start = (row + r) * geometry.depth() + j0;
    const DpaiRow part{state.s + start,
                       state.m ? state.m + start : nullptr,
                       state.v ? state.v + start : nullptr,
                       q + r * ld,
                       state.mask,
                       state.node_is_channel ? live.data() : nullptr,
                       words.data(),
                       start,
                       geometry.rows * geometry.depth(),
                       count,
                       geometry.taps(),
                       state.node_is_channel || state.node_live[row + r] != 0};
    kernels.dpai_row(part, rule, counts);
  }
  return counts;
}

// Integers, so the order in which the tiles arrive does not matter.
class Total {
 public:
  void add(const DpaiCounts &counts) {
    const std::lock_guard<std::mutex> lock(mutex_);
    sum_.weights += counts.weights;
    sum_.kernels += counts.kernels;
    sum_.finite &= counts.finite;
  }
  DpaiCounts sum() const { return sum_; }

 private:
  std::mutex mutex_;
  DpaiCounts sum_{};
};

}  // namespace

DpaiCounts dpai_step(const PathGeometry &geometry, const DpaiState &state, const DpaiRule &rule, const float *x,
                     const float *g) {
  Total total;
  const OuterMaps maps(geometry, x, g);
  for_outer_tiles(geometry, maps,
                  [&](int64_t row, int64_t rows, int64_t j0, int64_t count, const float *q, int64_t ld) {
                    total.add(update_tile(geometry, state, rule, row, rows, j0, count, q, ld));
                  });
  return total.sum();
}

DpaiCounts dpai_update(const PathGeometry &geometry, const DpaiState &state, const DpaiRule &rule, const float *q) {
  constexpr int64_t kTileWeights = 1 << 15;
  const int64_t columns = geometry.depth();
  const int64_t block = std::clamp<int64_t>(kTileWeights / std::max<int64_t>(1, columns), 1, geometry.group_rows());
  const int64_t blocks = divide_up(geometry.group_rows(), block), tasks = geometry.groups * blocks;
  Total total;
#pragma omp parallel for schedule(static) if (geometry.rows * columns > parallel_work() / 8)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t first = task % blocks * block, rows = std::min(block, geometry.group_rows() - first);
    const int64_t row = task / blocks * geometry.group_rows() + first;
    total.add(update_tile(geometry, state, rule, row, rows, 0, columns, q + row * columns, columns));
  }
  return total.sum();
}

}  // namespace paikern

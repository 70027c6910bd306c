// Row sums -> packed bits in three steps: the columns of every row, a byte a kernel that says whether it takes one
// weight more than the rest of its row, and the bits.
//
// The columns. Only the rows[i] % outputs weights that do not go round all columns are drawn. They are dealt from laps,
// a random permutation of the columns each, one lap after the other: every lap takes each column once, so the column
// sums stay within 1. A row that ends one lap and begins the next may not meet a column twice: the entries at the
// beginning of the new lap that it already has are exchanged for later ones. Since the row is shorter than a lap there
// are enough of those.
#include "balanced_mask.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <numeric>
#include <vector>

#include "philox.h"

namespace paikern {
namespace {

constexpr int64_t kParallel = 1 << 13;  // kernels; below this a thread costs more than it brings
// A word as a number below n: its upper part, off from uniform by less than n / 2**32.
uint32_t below(uint32_t word, uint32_t n) { return static_cast<uint32_t>((uint64_t{word} * n) >> 32); }

enum Purpose : uint32_t { kLaps = 0, kPositions = 1, kPurposes = 2 };

// The words of one counter, drawn as they are asked for.
class Draws {
 public:
  Draws(uint32_t first, uint32_t second, uint32_t tag, uint64_t seed)
      : first_(first), second_(second), tag_(tag), seed_(seed) {}

  uint32_t next() {
    if ((used_ & 3) == 0) words_ = philox({first_, second_, used_ >> 2, tag_}, seed_);
    return words_[used_++ & 3];
  }

 private:
  uint32_t first_, second_, tag_;
  uint64_t seed_;
  uint32_t used_ = 0;
  std::array<uint32_t, 4> words_{};
};

struct Source {
  KernelGrid grid;
  uint64_t seed;
  uint32_t stream;

  Draws draws(Purpose purpose, uint32_t first, uint32_t second) const {
    return Draws(first, second, stream * kPurposes + purpose, seed);
  }
};

// The columns of one group's rows: row i has order[starts[i]] up to order[starts[i + 1]].
struct Columns {
  std::vector<int64_t> starts;
  std::vector<int32_t> order;
};

void shuffle(int32_t *lap, int64_t outputs, Draws draws) {
  std::iota(lap, lap + outputs, 0);
  for (int64_t last = outputs - 1; last > 0; --last) {
    std::swap(lap[last], lap[below(draws.next(), static_cast<uint32_t>(last + 1))]);
  }
}

// Makes room at the beginning of a lap for the rest of a row that has `held` of the lap before.
void exchange(int32_t *lap, int64_t needed, const int32_t *held, int64_t count, int64_t mark,
              std::vector<int64_t> *seen) {
  for (int64_t k = 0; k < count; ++k) (*seen)[static_cast<size_t>(held[k])] = mark;
  const auto has = [&](int32_t column) { return (*seen)[static_cast<size_t>(column)] == mark; };
  for (int64_t k = 0, later = needed; k < needed; ++k) {
    if (!has(lap[k])) continue;
    while (has(lap[later])) ++later;
    std::swap(lap[k], lap[later]);
  }
}

// The rest of a row goes to the first columns of `favourites` that it does not have yet.
void favour(const std::vector<int32_t> &favourites, int32_t *row, int64_t held, int64_t count, int64_t mark,
            std::vector<int64_t> *seen) {
  for (int64_t k = 0; k < held; ++k) (*seen)[static_cast<size_t>(row[k])] = mark;
  for (size_t next = 0; held < count; ++next) {
    if ((*seen)[static_cast<size_t>(favourites[next])] != mark) row[held++] = favourites[next];
  }
}

Columns deal(const Source &from, const int64_t *rows, int64_t cover, int64_t group) {
  const int64_t outputs = from.grid.outputs, inputs = from.grid.inputs;
  Columns made;
  made.starts.assign(static_cast<size_t>(inputs + 1), 0);
  int64_t covered = 0;  // by what goes round all columns
  for (int64_t i = 0; i < inputs; ++i) {
    made.starts[static_cast<size_t>(i + 1)] = made.starts[static_cast<size_t>(i)] + rows[i] % outputs;
    covered += rows[i] / outputs;
  }
  const int64_t total = made.starts.back();
  int64_t laps = (total + outputs - 1) / outputs;
  if (cover >= 0) laps = std::min(laps, std::max<int64_t>(cover - covered, 0));
  const int64_t dealt = laps * outputs;
  made.order.resize(static_cast<size_t>(std::max(total, dealt)));
#pragma omp parallel for schedule(static) if (dealt > kParallel)
  for (int64_t lap = 0; lap < laps; ++lap) {
    shuffle(made.order.data() + lap * outputs, outputs,
            from.draws(kLaps, static_cast<uint32_t>(lap), static_cast<uint32_t>(group)));
  }
  std::vector<int32_t> favourites(static_cast<size_t>(total > dealt ? outputs : 0));
  if (total > dealt) {
    shuffle(favourites.data(), outputs, from.draws(kLaps, UINT32_MAX, static_cast<uint32_t>(group)));
  }
  std::vector<int64_t> seen(static_cast<size_t>(outputs), -1);
  for (int64_t i = 0; i < inputs; ++i) {
    const int64_t begin = made.starts[static_cast<size_t>(i)], end = made.starts[static_cast<size_t>(i + 1)];
    const int64_t next = (begin / outputs + 1) * outputs;
    int32_t *row = made.order.data() + begin;
    if (end > dealt) {
      favour(favourites, row, std::max<int64_t>(dealt - begin, 0), end - begin, i, &seen);
    } else if (end > next) {
      exchange(made.order.data() + next, end - next, row, next - begin, i, &seen);
    }
  }
  return made;
}

// Sets extra[kernel] to 1 where the kernel takes one weight more than rows[i] / outputs.
void mark(const KernelGrid &grid, int64_t group, const Columns &columns, uint8_t *extra) {
  const int64_t across = grid.transposed ? grid.outputs : grid.inputs;
  uint8_t *first = extra + group * grid.inputs * grid.outputs;
#pragma omp parallel for schedule(static) if (columns.starts.back() > kParallel)
  for (int64_t i = 0; i < grid.inputs; ++i) {
    for (int64_t k = columns.starts[static_cast<size_t>(i)]; k < columns.starts[static_cast<size_t>(i + 1)]; ++k) {
      const int64_t o = columns.order[static_cast<size_t>(k)];
      first[grid.transposed ? i * across + o : o * across + i] = 1;
    }
  }
}

inline void set(uint8_t *bits, int64_t i) { bits[i >> 3] |= static_cast<uint8_t>(1u << (i & 7)); }
inline bool get(const uint8_t *bits, int64_t i) { return (bits[i >> 3] >> (i & 7)) & 1; }

// `count` of the positions from bit `first` on, all subsets alike (Floyd: the j-th draw is below j + 1, and j itself
// stands in for one that is taken).
void draw_positions(Draws draws, int64_t count, int64_t positions, uint8_t *bits, int64_t first) {
  for (int64_t j = positions - count; j < positions; ++j) {
    const int64_t drawn = below(draws.next(), static_cast<uint32_t>(j + 1));
    set(bits, first + (get(bits, first + drawn) ? j : drawn));
  }
}

template <class T>
void best_positions(const T *scores, int64_t count, int64_t positions, std::vector<int64_t> *order, uint8_t *bits,
                    int64_t first) {
  order->resize(static_cast<size_t>(positions));
  std::iota(order->begin(), order->end(), int64_t{0});
  std::nth_element(order->begin(), order->begin() + (count - 1), order->end(), [&](int64_t a, int64_t b) {
    const T x = std::abs(scores[a]), y = std::abs(scores[b]);
    return x != y ? x > y : a < b;
  });
  for (int64_t k = 0; k < count; ++k) set(bits, first + (*order)[static_cast<size_t>(k)]);
}

template <class T>
bool has_nan(const T *scores, int64_t count) {
  return std::any_of(scores, scores + count, [](T x) { return std::isnan(x); });
}

// The row of one kernel after the other in stored order: dividing for each took half of the time of a linear layer.
class RowOf {
 public:
  RowOf(const KernelGrid &grid, int64_t kernel)
      : grid_(grid),
        across_(grid.transposed ? grid.outputs : grid.inputs),
        line_(kernel / across_),
        column_(kernel % across_) {
    begin_line();
  }

  int64_t row() const { return grid_.transposed ? line_ : first_ + column_; }

  void next() {
    if (++column_ < across_) return;
    column_ = 0;
    ++line_;
    begin_line();
  }

 private:
  void begin_line() { first_ = line_ / grid_.outputs * grid_.inputs; }

  KernelGrid grid_;
  int64_t across_, line_, column_, first_ = 0;
};

// Eight kernels end on a whole byte, so threads never share one.
template <class T>
bool fill(const Source &from, const int64_t *rows, const uint8_t *extra, const T *scores, uint8_t *bits) {
  const KernelGrid &grid = from.grid;
  const int64_t positions = grid.positions, kernels = grid.kernels(), numel = kernels * positions;
  std::vector<int64_t> rounds(static_cast<size_t>(grid.groups * grid.inputs));
  for (size_t i = 0; i < rounds.size(); ++i) rounds[i] = rows[i] / grid.outputs;
  std::atomic<bool> nan{false};
#pragma omp parallel if (kernels > kParallel)
  {
    std::vector<int64_t> order;
#pragma omp for schedule(static)
    for (int64_t eight = 0; eight < (kernels + 7) / 8; ++eight) {
      const int64_t stop = std::min(kernels, 8 * eight + 8);
      std::fill(bits + eight * positions, bits + std::min((eight + 1) * positions, (numel + 7) / 8), uint8_t{0});
      RowOf at(grid, 8 * eight);
      for (int64_t kernel = 8 * eight; kernel < stop; ++kernel, at.next()) {
        const int64_t count = rounds[static_cast<size_t>(at.row())] + extra[kernel], first = kernel * positions;
        if (scores != nullptr && has_nan(scores + first, positions)) nan.store(true, std::memory_order_relaxed);
        if (count == positions) {
          for (int64_t k = 0; k < positions; ++k) set(bits, first + k);
        } else if (count > 0 && scores != nullptr) {
          best_positions(scores + first, count, positions, &order, bits, first);
        } else if (count > 0) {
          const auto number = static_cast<uint64_t>(kernel);
          draw_positions(from.draws(kPositions, static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32)),
                         count, positions, bits, first);
        }
      }
    }
  }
  return !nan.load();
}

}  // namespace

bool balanced_mask(const int64_t *rows, const KernelGrid &grid, int64_t cover, uint64_t seed, uint32_t stream,
                   const void *scores, bool wide, uint8_t *bits) {
  if (grid.kernels() == 0) return true;
  const Source from{grid, seed, stream};
  std::vector<uint8_t> extra(static_cast<size_t>(grid.kernels()), 0);
  for (int64_t group = 0; group < grid.groups; ++group) {
    mark(grid, group, deal(from, rows + group * grid.inputs, cover, group), extra.data());
  }
  if (wide) return fill(from, rows, extra.data(), static_cast<const double *>(scores), bits);
  return fill(from, rows, extra.data(), static_cast<const float *>(scores), bits);
}

}  // namespace paikern

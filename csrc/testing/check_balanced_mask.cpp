// balanced_mask: row sums, even columns, spare bits, the same bits for any team, magnitudes in place of draws.
#include <algorithm>
#include <cmath>
#include <limits>

#include "balanced_mask.h"
#include "check.h"

namespace check {
namespace {

using paikern::KernelGrid;

struct Made {
  KernelGrid grid;
  std::vector<int64_t> rows;
  std::vector<uint8_t> bits;

  int64_t count(int64_t group, int64_t input, int64_t output) const {
    const int64_t kernel = grid.transposed ? (group * grid.inputs + input) * grid.outputs + output
                                           : (group * grid.outputs + output) * grid.inputs + input;
    int64_t kept = 0;
    for (int64_t k = 0; k < grid.positions; ++k) kept += bit(bits, kernel * grid.positions + k);
    return kept;
  }
};

Made make(Random &random) {
  const KernelGrid grid{1 + below(random, 3), pick<int64_t>(random, {1, 2, 5, 40, 130}),
                        pick<int64_t>(random, {1, 2, 7, 33, 129}), pick<int64_t>(random, {1, 2, 9, 70}),
                        below(random, 2) == 0};
  Made made{grid, {}, {}};
  const int64_t most = grid.outputs * grid.positions, upper = pick<int64_t>(random, {most, (most + 9) / 10});
  for (int64_t i = 0; i < grid.groups * grid.inputs; ++i) made.rows.push_back(below(random, upper + 1));
  made.bits.assign(static_cast<size_t>((grid.kernels() * grid.positions + 7) / 8), 0xa5);
  return made;
}

// With `cover` >= 0 columns are even, or none is below it.
void sums(const Made &made, int64_t cover = -1) {
  const KernelGrid &grid = made.grid;
  for (int64_t g = 0; g < grid.groups; ++g) {
    std::vector<int64_t> columns(static_cast<size_t>(grid.outputs), 0);
    for (int64_t i = 0; i < grid.inputs; ++i) {
      const int64_t wanted = made.rows[static_cast<size_t>(g * grid.inputs + i)];
      int64_t row = 0;
      for (int64_t o = 0; o < grid.outputs; ++o) {
        const int64_t kept = made.count(g, i, o);
        CHECK(kept == wanted / grid.outputs || kept == wanted / grid.outputs + 1);
        row += kept;
        columns[static_cast<size_t>(o)] += kept;
      }
      CHECK(row == wanted);
    }
    const auto [least, most] = std::minmax_element(columns.begin(), columns.end());
    CHECK(*most - *least <= 1 || (cover >= 0 && *least >= cover));
  }
  for (int64_t i = grid.kernels() * grid.positions; i < 8 * static_cast<int64_t>(made.bits.size()); ++i) {
    CHECK(!bit(made.bits, i));
  }
}

template <class T>
void ranked(Random &random, Made made) {
  std::vector<T> scores(static_cast<size_t>(made.grid.kernels() * made.grid.positions));
  for (T &score : scores) score = static_cast<T>(below(random, 7) - 3);
  const bool wide = sizeof(T) == 8;
  CHECK(paikern::balanced_mask(made.rows.data(), made.grid, -1, 1, 2, scores.data(), wide, made.bits.data()));
  sums(made);
  const int64_t positions = made.grid.positions;
  for (int64_t i = 0; i < static_cast<int64_t>(scores.size()); ++i) {
    if (!bit(made.bits, i)) continue;
    for (int64_t j = i / positions * positions; j < (i / positions + 1) * positions; ++j) {
      const T kept = std::abs(scores[static_cast<size_t>(i)]), other = std::abs(scores[static_cast<size_t>(j)]);
      CHECK(bit(made.bits, j) || kept > other || (kept == other && i < j));
    }
  }
  scores[static_cast<size_t>(below(random, static_cast<int64_t>(scores.size())))] = std::numeric_limits<T>::quiet_NaN();
  CHECK(!paikern::balanced_mask(made.rows.data(), made.grid, -1, 1, 2, scores.data(), wide, made.bits.data()));
}

}  // namespace

void balanced(Random &random, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    Made made = make(random);
    const uint64_t seed = random();
    CHECK(paikern::balanced_mask(made.rows.data(), made.grid, -1, seed, 3, nullptr, false, made.bits.data()));
    sums(made);
    std::vector<uint8_t> again(made.bits.size(), 0x5a);
    CHECK(paikern::balanced_mask(made.rows.data(), made.grid, -1, seed, 3, nullptr, false, again.data()));
    CHECK(again == made.bits);
    const int64_t cover = below(random, 4);
    CHECK(paikern::balanced_mask(made.rows.data(), made.grid, cover, seed, 3, nullptr, false, made.bits.data()));
    sums(made, cover);
    below(random, 2) == 0 ? ranked<float>(random, made) : ranked<double>(random, made);
  }
  const KernelGrid none{1, 0, 5, 9, false};
  CHECK(paikern::balanced_mask(nullptr, none, -1, 0, 0, nullptr, false, nullptr));
}

}  // namespace check

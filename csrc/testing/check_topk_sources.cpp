// Scores that are not a plain array (strided, products, computed tiles, candidates, a remembered threshold) must select
// what the same scores do when they are stored; check_topk.cpp compares those with a sort.
#include <cmath>
#include <limits>

#include "check.h"
#include "path_score_tiles.h"
#include "topk.h"

namespace check {
namespace {

using paikern::Ranking;
using paikern::ScoreLayout;
using paikern::ScoreSource;

std::vector<float> values_of(Random &random, int64_t numel) {
  const bool ties = below(random, 2) == 0;
  std::vector<float> values(static_cast<size_t>(numel));
  for (float &value : values) {
    value =
        ties ? static_cast<float>(below(random, 9) - 4) : static_cast<float>(static_cast<int32_t>(random())) * 0x1p-29f;
  }
  return values;
}

std::vector<uint8_t> select(ScoreSource source, int64_t k, double *memory = nullptr) {
  std::vector<uint8_t> bits(static_cast<size_t>((source.numel + 7) / 8), 0xa5);
  source.bits = bits.data();
  CHECK(paikern::topk_mask({source}, {Ranking{0, 1, k, memory}}) == -1);
  return bits;
}

ScoreSource stored(const std::vector<float> &values) {
  ScoreSource source;
  source.data = values.data();
  source.numel = static_cast<int64_t>(values.size());
  return source;
}

void strided(Random &random) {
  const int64_t rows = pick<int64_t>(random, {1, 3, 70, 300}), columns = pick<int64_t>(random, {1, 5, 64, 257});
  const std::vector<float> values = values_of(random, rows * columns);
  const ScoreLayout layout = paikern::coalesce({columns, 1, rows}, {1, 7, columns});  // the transposed matrix
  std::vector<float> moved;
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) moved.push_back(values[static_cast<size_t>(r * columns + c)]);
  }
  ScoreSource source = stored(values);
  source.layout = layout.sizes.empty() ? nullptr : &layout;
  ScoreSource expected = stored(moved);
  source.absolute = expected.absolute = below(random, 2) == 0;
  std::vector<uint8_t> candidates;
  if (below(random, 2) == 0) {
    candidates = random_bits(random, rows * columns, 6);
    source.candidates = expected.candidates = candidates.data();
    for (int64_t i = 0; i < rows * columns; ++i) {
      float &value = moved[static_cast<size_t>(i)];
      value = !bit(candidates, i) ? -std::numeric_limits<float>::infinity()
              : expected.absolute ? std::fabs(value)
                                  : value;
    }
    expected.candidates = nullptr;
    expected.absolute = false;
  }
  const int64_t k = below(random, rows * columns + 1);
  CHECK(select(source, k) == select(expected, k));
}

void product(Random &random) {
  const int64_t numel = pick<int64_t>(random, {1, 9, 600, 5'000, 70'000});
  const std::vector<float> x = values_of(random, numel), y = values_of(random, 2 * numel);
  const ScoreLayout every_other{{numel}, {2}};
  std::vector<float> scores;
  for (int64_t i = 0; i < numel; ++i) {
    scores.push_back(std::fabs(x[static_cast<size_t>(i)] * y[static_cast<size_t>(2 * i)]));
  }
  ScoreSource source = stored(x);
  source.other = y.data();
  source.other_layout = &every_other;
  const int64_t k = below(random, numel + 1);
  CHECK(select(source, k) == select(stored(scores), k));
}

void tiles(Random &random) {
  const int64_t groups = pick<int64_t>(random, {1, 2}), channels = groups * pick<int64_t>(random, {1, 4, 24});
  const int64_t rows = groups * pick<int64_t>(random, {3, 40, 170}), side = pick<int64_t>(random, {1, 4});
  const int64_t kernel = side == 1 ? 1 : 3;
  paikern::PathGeometry geometry{2,
                                 groups,
                                 rows,
                                 channels,
                                 {1, side, side},
                                 {1, kernel, kernel},
                                 {1, 1, 1},
                                 {0, 0, 0},
                                 {1, 1, 1},
                                 {1, side - kernel + 1, side - kernel + 1}};
  const std::vector<float> w = values_of(random, rows * geometry.depth());
  std::vector<float> x(static_cast<size_t>(2 * channels * side * side)),
      g(static_cast<size_t>(2 * rows * geometry.out_pixels()));
  for (auto *map : {&x, &g}) {
    for (float &value : *map) value = static_cast<float>(below(random, 1000)) * 0x1p-7f;
  }
  const paikern::WeightView view{w.data(), nullptr, static_cast<int64_t>(w.size()), paikern::WeightType::kFloat32, 1};
  std::vector<float> scores(w.size());
  paikern::path_score(geometry, view, x.data(), g.data(), 0.0f, scores.data());
  const paikern::PathScoreTiles computed(geometry, view, x.data(), g.data());
  ScoreSource source;
  source.numel = static_cast<int64_t>(w.size());
  source.tiles = &computed;
  const int64_t k = below(random, source.numel + 1);
  CHECK(select(source, k) == select(stored(scores), k));
}

void remembered(Random &random) {
  std::vector<float> values = values_of(random, pick<int64_t>(random, {9, 5'000, 70'000}));
  const int64_t k = below(random, static_cast<int64_t>(values.size()) + 1);
  double memory[2] = {NAN, NAN};
  for (int round = 0; round < 4; ++round) {
    CHECK(select(stored(values), k, memory) == select(stored(values), k));
    const float scale = round == 2 ? 1e4f : 1.001f;  // a jump that the memory does not foresee
    for (float &value : values) value *= scale;
  }
}

// Zeros above a negative threshold, so evenly spaced that they are what a small sample of the candidates sees.
void zeros_among_negatives(Random &random) {
  std::vector<float> values = values_of(random, 4'096);
  for (float &value : values) value = -std::fabs(value) - 0.5f;
  for (size_t i = 0; i < values.size(); i += 64) values[i] = i % 128 == 0 ? 0.0f : -0.0f;
  const int64_t k = 100 + below(random, 3'000);
  std::vector<uint8_t> bits = select(stored(values), k);
  double memory[2] = {0.0, 1e6};  // a band with room for all
  CHECK(select(stored(values), k, memory) == bits);
}

}  // namespace

void topk_sources(Random &random, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    strided(random);
    product(random);
    tiles(random);
    remembered(random);
    zeros_among_negatives(random);
  }
}

}  // namespace check

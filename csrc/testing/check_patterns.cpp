// N:M masks against a sort of every group, block means against the sum that is promised, block bits one by one.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "check.h"
#include "halves.h"
#include "pattern.h"

namespace check {
namespace {

using paikern::NmSource;
using paikern::PatternScores;
using paikern::PatternType;

// Scores in storage of exactly their size, with whatever strides, and what they count as in row-major order.
struct Scores {
  std::vector<uint8_t> storage;
  std::vector<float> a, g;
  std::vector<uint8_t> candidates, bits;
  std::vector<double> values;
  PatternScores scores;
};

float random_value(Random &random, int kind) {
  switch (kind) {
    case 0:
      return static_cast<float>(static_cast<int32_t>(random())) * 0x1p-30f;
    case 1:
      return static_cast<float>(below(random, 4)) - 1.0f;
    case 2:
      return pick<float>(random, {0.0f, -0.0f, 1e-45f, -1e-45f, 3e38f, INFINITY, -INFINITY, 1.0f, -1.0f});
    default:
      return 0.25f;
  }
}

template <class Word>
void put(std::vector<uint8_t> *storage, int64_t at, Word word) {
  std::memcpy(storage->data() + at * static_cast<int64_t>(sizeof(Word)), &word, sizeof(Word));
}

// Writes the value in the type and returns what it became.
double store(std::vector<uint8_t> *storage, PatternType type, int64_t at, float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  const uint16_t top = static_cast<uint16_t>(word >> 16);
  switch (type) {
    case PatternType::kFloat64:
      put(storage, at, static_cast<double>(value) * (1.0 + 0x1p-40));
      return static_cast<double>(value) * (1.0 + 0x1p-40);
    case PatternType::kFloat32:
      put(storage, at, value);
      return static_cast<double>(value);
    case PatternType::kBfloat16:
      put(storage, at, top);
      return static_cast<double>(paikern::bfloat16_to_float(top));
    default:  // the upper half of the bits is some float16, unless it is NaN
      const uint16_t half = std::isnan(paikern::float16_to_float(top)) ? 0x3c00 : top;
      put(storage, at, half);
      return static_cast<double>(paikern::float16_to_float(half));
  }
}

int64_t itemsize(PatternType type) {
  return type == PatternType::kFloat64 ? 8 : (type == PatternType::kFloat32 ? 4 : 2);
}

Scores make_scores(Random &random, const std::vector<int64_t> &sizes, bool infinities) {
  Scores made;
  PatternScores &s = made.scores;
  s = {nullptr,
       PatternType::kFloat32,
       sizes,
       std::vector<int64_t>(sizes.size()),
       below(random, 2) == 0,
       nullptr,
       nullptr,
       sizes.back(),
       static_cast<int>(1 + below(random, 2)),
       nullptr};
  s.type = pick(random, {PatternType::kFloat32, PatternType::kFloat32, PatternType::kBfloat16, PatternType::kFloat16,
                         PatternType::kFloat64});
  const int64_t numel = s.numel();
  // Dimensions lie in memory in any order, now and then with gaps.
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  if (below(random, 2) == 0) std::shuffle(order.begin(), order.end(), random);
  int64_t step = below(random, 4) == 0 ? 2 : 1;
  for (size_t d = order.size(); d-- > 0;) {
    s.strides[order[d]] = step;
    step *= sizes[order[d]];
  }
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) last += std::max<int64_t>(0, sizes[d] - 1) * s.strides[d];
  made.storage.assign(static_cast<size_t>((numel == 0 ? 0 : last + 1) * itemsize(s.type)), 0xff);  // gaps are NaN
  const int kind =
      pick(random, infinities ? std::initializer_list<int>{0, 1, 2, 3} : std::initializer_list<int>{0, 1, 3});
  for (int64_t i = 0; i < numel; ++i) {
    int64_t rest = i, at = 0;
    for (size_t d = sizes.size(); d-- > 0;) {
      at += rest % sizes[d] * s.strides[d];
      rest /= sizes[d];
    }
    const double value = store(&made.storage, s.type, at, random_value(random, kind));
    made.values.push_back(s.absolute ? std::fabs(value) : value);
  }
  made.bits.assign(static_cast<size_t>((numel + 7) / 8), 0xa5);
  return made;
}

Scores make_factored(Random &random, int64_t rows, int64_t columns) {
  Scores made = make_scores(random, {rows, columns}, false);
  made.scores.absolute = false;
  for (int64_t i = 0; i < columns; ++i) made.a.push_back(static_cast<float>(below(random, 5)));
  for (int64_t i = 0; i < rows; ++i) made.g.push_back(static_cast<float>(below(random, 3)) * 0.5f);
  if (below(random, 2) == 0) made.candidates = random_bits(random, rows * columns, 6);
  for (int64_t i = 0; i < rows * columns; ++i) {
    double &value = made.values[static_cast<size_t>(i)];
    const float w = std::fabs(static_cast<float>(value));
    const float powered = made.scores.power == 1 ? w : w * w;
    value = static_cast<double>((powered * made.a[static_cast<size_t>(i % columns)]) *
                                made.g[static_cast<size_t>(i / columns)]);
    if (!made.candidates.empty() && !bit(made.candidates, i)) value = -1.0;
  }
  return made;
}

// Storage moves when scores do, so addresses are taken last.
const PatternScores &pointed(Scores *made) {
  made->scores.data = made->storage.data();
  made->scores.a = made->a.empty() ? nullptr : made->a.data();
  made->scores.g = made->g.empty() ? nullptr : made->g.data();
  made->scores.candidates = made->candidates.empty() ? nullptr : made->candidates.data();
  return made->scores;
}

void check_groups(const Scores &made, int64_t axis, int64_t inner, int64_t n, int64_t m) {
  const int64_t numel = made.scores.numel();
  for (int64_t i = numel; i < 8 * static_cast<int64_t>(made.bits.size()); ++i) CHECK(!bit(made.bits, i));
  for (int64_t outer = 0; outer < (numel == 0 ? 0 : numel / (axis * inner)); ++outer) {
    for (int64_t first = 0; first < axis; first += m) {
      const int64_t width = std::min(m, axis - first), keep = (width * n + m - 1) / m;
      for (int64_t s = 0; s < inner; ++s) {
        const auto at = [&](int64_t j) { return (outer * axis + first + j) * inner + s; };
        std::vector<int64_t> order(static_cast<size_t>(width));
        std::iota(order.begin(), order.end(), int64_t{0});
        std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
          return made.values[static_cast<size_t>(at(x))] > made.values[static_cast<size_t>(at(y))];
        });
        for (int64_t j = 0; j < width; ++j) CHECK(bit(made.bits, at(order[static_cast<size_t>(j)])) == (j < keep));
      }
    }
  }
}

void groups(Random &random) {
  const int64_t m = pick<int64_t>(random, {1, 2, 3, 4, 4, 5, 8, 8, 11, 16, 16, 17, 40}), n = 1 + below(random, m);
  std::vector<Scores> layers;
  std::vector<NmSource> sources;
  for (int64_t left = 1 + below(random, 3); left > 0; --left) {
    if (below(random, 4) == 0) {
      layers.push_back(make_factored(random, 1 + below(random, 20), 1 + below(random, 70)));
      sources.push_back({{}, layers.back().scores.sizes[1], 1, nullptr});
      continue;
    }
    const int64_t outer = pick<int64_t>(random, {0, 1, 2, 5, 9, 40}),
                  axis = pick<int64_t>(random, {1, 4, 9, 16, 64, 70});
    const int64_t inner = pick<int64_t>(random, {1, 1, 1, 2, 9, 57, 600});
    layers.push_back(make_scores(random, {outer, axis, inner}, true));
    sources.push_back({{}, axis, inner, nullptr});
  }
  for (size_t l = 0; l < layers.size(); ++l) {
    sources[l].scores = pointed(&layers[l]);
    sources[l].bits = layers[l].bits.data();
  }
  CHECK(paikern::nm_mask(sources, n, m) == -1);
  for (size_t l = 0; l < layers.size(); ++l) check_groups(layers[l], sources[l].axis, sources[l].inner, n, m);
}

void nan_is_found(Random &random) {
  std::vector<float> good(64, 1.0f), bad(70'000, 1.0f);
  bad[static_cast<size_t>(below(random, 70'000))] = std::numeric_limits<float>::quiet_NaN();
  std::vector<uint8_t> bits(70'000 / 8);
  const auto source = [&](const std::vector<float> &from, int64_t width) {
    const int64_t rows = static_cast<int64_t>(from.size()) / width;
    const PatternScores scores{
        from.data(), PatternType::kFloat32, {rows, width}, {width, 1}, false, nullptr, nullptr, width, 1, nullptr};
    return NmSource{scores, width, 1, bits.data()};
  };
  for (const int64_t m : {2, 5, 35}) {
    CHECK(paikern::nm_mask({source(good, 64), source(bad, 70)}, 1, m) == 1);
    CHECK(paikern::nm_mask({source(good, 64)}, 1, m) == -1);
  }
  std::vector<double> means(70'000);
  CHECK(paikern::block_means(source(bad, 70).scores, 70, 3, 16, means.data()));
}

void blocks(Random &random) {
  const int64_t rows = pick<int64_t>(random, {1, 2, 17, 33, 64}),
                columns = pick<int64_t>(random, {1, 7, 9, 64, 150, 5'000});
  const int64_t high = 1 + below(random, rows),
                wide = pick<int64_t>(random, {1, 3, 8, 9, 16, columns, 1 + below(random, columns)});
  Scores made =
      below(random, 4) == 0 ? make_factored(random, rows, columns) : make_scores(random, {rows, columns}, false);
  const int64_t block = std::min(wide, columns), across = (columns + block - 1) / block,
                down = (rows + high - 1) / high;
  std::vector<double> means(static_cast<size_t>(across * down), -7.0);
  CHECK(!paikern::block_means(pointed(&made), columns, high, block, means.data()));
  for (int64_t b = 0; b < across * down; ++b) {
    double lanes[8] = {};
    int64_t count = 0;
    for (int64_t i = b / across * high; i < std::min(rows, (b / across + 1) * high); ++i) {
      for (int64_t j = 0; j < std::min(block, columns - b % across * block); ++j, ++count) {
        lanes[j % 8] += made.values[static_cast<size_t>(i * columns + b % across * block + j)];
      }
    }
    double sum = lanes[0];
    for (int lane = 1; lane < 8; ++lane) sum += lanes[lane];
    CHECK(means[static_cast<size_t>(b)] == sum / static_cast<double>(count));
  }
  const auto kept = random_bits(random, across * down, 5);
  std::vector<uint8_t> bits(static_cast<size_t>((rows * columns + 7) / 8), 0xa5);
  paikern::expand_blocks(kept.data(), rows, columns, high, block, bits.data());
  for (int64_t i = 0; i < 8 * static_cast<int64_t>(bits.size()); ++i) {
    const int64_t row = i / columns, column = i % columns;
    CHECK(bit(bits, i) == (i < rows * columns && bit(kept, row / high * across + column / block)));
  }
}

}  // namespace

void patterns(Random &random, int rounds) {
  for (int round = 0; round < 2 * rounds; ++round) {
    groups(random);
    blocks(random);
  }
  nan_is_found(random);
}

}  // namespace check

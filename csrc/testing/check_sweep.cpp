// The sweep of a layer against plain loops over its weights, and a stream of layers against topk_mask and counts in
// long double, which holds every value * 2**exponent without rounding.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <mutex>

#include "check.h"
#include "halves.h"
#include "path.h"
#include "path_sweep.h"
#include "topk.h"
#include "topk_stream.h"

namespace check {
namespace {

using paikern::ScoreSource;
using paikern::SweepLayer;
using paikern::TopkStream;
using paikern::WeightType;

struct Linear {
  std::vector<uint8_t> storage, mask;
  std::vector<float> a, g, scores;  // scores as they should be; of pruned weights -infinity
  SweepLayer layer;
  int64_t exponent = 0;

  int64_t numel() const { return layer.rows * layer.columns; }
};

float random_weight(Random &random, int kind) {
  switch (kind) {
    case 0:
      return static_cast<float>(static_cast<int32_t>(random())) * 0x1p-31f;
    case 1:
      return static_cast<float>(below(random, 5) - 2) * 0.25f;  // ties
    default:
      return pick<float>(random, {0.0f, -0.0f, 1e-45f, 1e-38f, 0x1p60f, 1.0f, -3.0f});
  }
}

Linear make_linear(Random &random, int64_t rows, int64_t columns, int power) {
  Linear made;
  const auto type = pick(random, {WeightType::kFloat32, WeightType::kBfloat16, WeightType::kFloat16});
  const int kind = static_cast<int>(below(random, 3));
  if (below(random, 2) == 0) made.mask = random_bits(random, rows * columns, pick<int64_t>(random, {0, 3, 9, 10}));
  for (int64_t j = 0; j < columns; ++j) made.a.push_back(static_cast<float>(below(random, 50)) * 0x1p-4f);
  for (int64_t i = 0; i < rows; ++i) made.g.push_back(static_cast<float>(below(random, 50)) * 0x1p-3f);
  for (int64_t i = 0; i < rows * columns; ++i) {
    float value = random_weight(random, kind);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const auto append = [&](const auto &word) {
      const auto *bytes = reinterpret_cast<const uint8_t *>(&word);
      made.storage.insert(made.storage.end(), bytes, bytes + sizeof(word));
    };
    const uint16_t top = static_cast<uint16_t>(bits >> 16);
    if (type == WeightType::kFloat32) append(value);
    if (type == WeightType::kBfloat16) {
      append(top);
      value = paikern::bfloat16_to_float(top);
    }
    if (type == WeightType::kFloat16) {  // the upper half of the bits is some float16, infinity and NaN excepted
      const uint16_t half = (top & 0x7c00u) == 0x7c00u ? 0x3c00 : top;
      append(half);
      value = paikern::float16_to_float(half);
    }
    const float magnitude = power == 0 ? 1.0f : power == 1 ? std::fabs(value) : value * value;
    const bool kept = made.mask.empty() || bit(made.mask, i);
    const float *g = made.g.data() + i / columns, *a = made.a.data() + i % columns;
    made.scores.push_back(kept ? (magnitude * *a) * *g : -INFINITY);
  }
  made.layer = {{nullptr, nullptr, rows * columns, type, power}, rows, columns, nullptr, nullptr};
  return made;
}

// Storage moves when layers do, so addresses are taken last.
SweepLayer layer_of(const Linear &made) {
  SweepLayer layer = made.layer;
  layer.w.data = layer.w.power == 0 ? nullptr : made.storage.data();
  layer.w.mask = made.mask.empty() ? nullptr : made.mask.data();
  layer.a = made.a.data();
  layer.g = made.g.data();
  return layer;
}

class Collected final : public paikern::SweepSink {
 public:
  void take(const float *scores, const int64_t *positions, int64_t count) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (int64_t i = 0; i < count; ++i) found.push_back({positions[i], scores[i]});
  }
  std::vector<std::pair<int64_t, float>> found;

 private:
  std::mutex mutex_;
};

bool same(float x, float y) { return std::memcmp(&x, &y, sizeof(x)) == 0 || (x != x && y != y); }

void one_layer(Random &random) {
  const int64_t columns = pick<int64_t>(random, {1, 3, 8, 31, 33, 64, 200, 4'104, 4'133});
  const int64_t rows = columns > 1'000 ? pick<int64_t>(random, {3, 9, 300}) : pick<int64_t>(random, {1, 2, 7, 31, 300});
  Linear made = make_linear(random, rows, columns, static_cast<int>(below(random, 3)));
  if (below(random, 4) == 0) {  // infinity times 0 is NaN
    const int64_t i = below(random, rows), j = below(random, columns);
    made.g[static_cast<size_t>(i)] = INFINITY;
    made.a[static_cast<size_t>(j)] = 0.0f;
    for (int64_t n = 0; n < rows * columns; ++n) {
      if (n / columns != i && n % columns != j) continue;
      const float *a = made.a.data() + n % columns, *g = made.g.data() + n / columns;
      float magnitude = 1.0f;
      if (made.layer.w.power != 0) {
        const auto *bytes = made.storage.data();
        uint16_t half;
        if (made.layer.w.type == WeightType::kFloat32) {
          std::memcpy(&magnitude, bytes + 4 * n, 4);
        } else {
          std::memcpy(&half, bytes + 2 * n, 2);
          magnitude = made.layer.w.type == WeightType::kBfloat16 ? paikern::bfloat16_to_float(half)
                                                                 : paikern::float16_to_float(half);
        }
        magnitude = made.layer.w.power == 1 ? std::fabs(magnitude) : magnitude * magnitude;
      }
      float &score = made.scores[static_cast<size_t>(n)];
      if (made.mask.empty() || bit(made.mask, n)) score = (magnitude * *a) * *g;
    }
  }
  const auto some = [&] {
    const float score = made.scores[static_cast<size_t>(below(random, rows * columns))];
    return below(random, 3) == 0 || !(score >= 0) ? pick<float>(random, {0.0f, 1.0f, INFINITY}) : score;
  };
  paikern::SweepBand band{some(), some()};
  if (band.low > band.high && below(random, 2) == 0) std::swap(band.low, band.high);
  const SweepLayer layer = layer_of(made);
  std::vector<uint8_t> bits(static_cast<size_t>((rows * columns + 7) / 8), 0xa5), others = bits;
  std::vector<float> x(static_cast<size_t>(columns), NAN), expected(x);
  Collected sink, again;
  const int64_t above = paikern::path_sweep(layer, band, bits.data(), x.data(), sink);
  CHECK(paikern::path_sweep(layer, band, others.data(), nullptr, again) == above);
  paikern::path_backward({1, 1, rows, columns, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, {1, 1, 1}},
                         layer.w, layer.g, expected.data());
  for (size_t j = 0; j < x.size(); ++j) CHECK(same(x[j], expected[j]));
  CHECK(bits == others);
  std::sort(sink.found.begin(), sink.found.end(), [](auto p, auto q) { return p.first < q.first; });
  size_t next = 0;
  int64_t set = 0;
  for (int64_t n = 0; n < rows * columns; ++n) {
    const float score = made.scores[static_cast<size_t>(n)];
    const bool kept = made.mask.empty() || bit(made.mask, n), over = kept && score > band.high;
    CHECK(bit(bits, n) == over);
    set += over;
    if (!kept || over || score < band.low) continue;
    CHECK(next < sink.found.size() && sink.found[next].first == n && same(sink.found[next].second, score));
    ++next;
  }
  CHECK(next == sink.found.size() && next == again.found.size() && set == above);
  for (int64_t n = rows * columns; n < 8 * static_cast<int64_t>(bits.size()); ++n) CHECK(!bit(bits, n));
}

// What a bound given as a logarithm stands for.
long double bound_of(double log2) {
  const double whole = std::floor(log2);
  return std::isinf(log2) ? std::exp2(log2)
                          : std::ldexp(static_cast<long double>(std::exp2(log2 - whole)), static_cast<int>(whole));
}

void feed(Random &random, TopkStream &stream, int64_t index, const Linear &made) {
  if (made.layer.w.power != 0) {
    std::vector<float> x(static_cast<size_t>(made.layer.columns));
    stream.sweep(index, made.exponent, layer_of(made), below(random, 2) == 0 ? x.data() : nullptr);
    return;
  }
  // As scores from elsewhere: pieces in any order, from several threads.
  const int64_t size = pick<int64_t>(random, {8, 640, 16'392}), pieces = (made.numel() + size - 1) / size;
  std::vector<int64_t> starts;
  for (int64_t piece = 0; piece < pieces; ++piece) starts.push_back(piece * size);
  std::shuffle(starts.begin(), starts.end(), random);
#pragma omp parallel for schedule(dynamic)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t start = starts[static_cast<size_t>(piece)];
    stream.tile(index, made.exponent, start, std::min(size, made.numel() - start), made.scores.data() + start);
  }
}

void one_stream(Random &random, bool large) {
  std::vector<Linear> layers;
  const int64_t count = 1 + below(random, 5);
  const bool exponents = below(random, 2) == 0;
  int64_t total = 0;
  for (int64_t l = 0; l < count; ++l) {
    const int64_t rows = pick<int64_t>(random, {1, 7, 40}), columns = pick<int64_t>(random, {1, 31, 64, 130});
    // Power 0 stands for scores that come as tiles.
    const int power = static_cast<int>(below(random, 3));
    layers.push_back(make_linear(random, large && l == 0 ? 310 : rows, large && l == 0 ? 257 : columns, power));
    if (power == 0 && below(random, 4) == 0) {
      for (int n = 0; n < 3; ++n)
        layers.back().scores[static_cast<size_t>(below(random, layers.back().numel()))] = INFINITY;
    }
    if (exponents) layers.back().exponent = below(random, 300) - 150;
    total += layers.back().numel();
  }
  std::vector<std::vector<uint8_t>> streamed, ranked;
  for (const Linear &made : layers) streamed.emplace_back(static_cast<size_t>((made.numel() + 7) / 8), 0xa5);
  ranked = streamed;
  std::vector<ScoreSource> sources;
  std::vector<TopkStream::Source> targets;
  std::vector<long double> values;
  for (size_t l = 0; l < layers.size(); ++l) {
    const Linear &made = layers[l];
    ScoreSource source;
    source.data = made.scores.data();
    source.numel = made.numel();
    source.exponent = made.exponent;
    source.bits = ranked[l].data();
    if (made.layer.w.power != 0) {
      source.data = made.storage.data();
      source.type = static_cast<paikern::ScoreType>(made.layer.w.type);
      source.a = made.a.data();
      source.g = made.g.data();
      source.columns = made.layer.columns;
      source.power = made.layer.w.power;
      source.candidates = made.mask.empty() ? nullptr : made.mask.data();
    }
    sources.push_back(source);
    targets.push_back({made.numel(), streamed[l].data()});
    for (const float score : made.scores)
      values.push_back(std::ldexp(static_cast<long double>(score), static_cast<int>(made.exponent)));
  }
  std::vector<long double> order = values;
  std::sort(order.begin(), order.end(), std::greater<long double>());
  TopkStream stream(targets);
  for (int pass = 0; pass < 3; ++pass) {  // the same stream, as rounds of a run use it
    const int64_t k = below(random, total + 1);
    const auto log_of_rank = [&](int64_t rank) {
      const long double value = order[static_cast<size_t>(std::clamp<int64_t>(rank, 0, total - 1))];
      return value > 0 ? static_cast<double>(std::log2(value)) : -INFINITY;
    };
    const int64_t reach = pick<int64_t>(random, {0, 3, total / 8, total});
    double low = log_of_rank(k + reach) - 1e-9, high = log_of_rank(k - reach) + 1e-9;
    if (below(random, 6) == 0) high = INFINITY;
    if (below(random, 8) == 0) low = high + 1;               // beside everything, or no band
    if (below(random, 8) == 0) low = high = log_of_rank(k);  // no slack for the rounding of the logarithm
    stream.begin(k, low, high);
    std::vector<size_t> turns;
    for (size_t l = 0; l < layers.size(); ++l) turns.push_back(l);
    std::shuffle(turns.begin(), turns.end(), random);
    for (const size_t l : turns) feed(random, stream, static_cast<int64_t>(l), layers[l]);
    const bool done = stream.finish();
    CHECK(stream.nan() == -1);
    if (!(low <= high)) {
      CHECK(!done);
      continue;
    }
    const long double from = bound_of(low), to = bound_of(high);
    int64_t above = 0, inside = 0;
    for (const long double value : values) {
      above += value > to;
      inside += value >= from && value <= to;
    }
    CHECK(stream.above() == above && stream.candidates() == inside);
    CHECK(done == (k > above && k <= above + inside && inside <= stream.room()));
    if (!done) continue;
    const long double kth = order[static_cast<size_t>(k - 1)];
    const double log2_kth = kth == 0 ? -INFINITY : static_cast<double>(std::log2(kth));
    CHECK(stream.log2_kth() == log2_kth || std::fabs(stream.log2_kth() - log2_kth) < 1e-12);
    CHECK(paikern::topk_mask(sources, {paikern::Ranking{0, count, k}}) == -1);
    CHECK(streamed == ranked);
  }
}

void not_a_number(Random &random) {
  std::vector<Linear> layers;
  std::vector<std::vector<uint8_t>> bits;
  std::vector<TopkStream::Source> targets;
  for (int l = 0; l < 3; ++l) {
    layers.push_back(make_linear(random, 9, 31, 1));
    bits.emplace_back(static_cast<size_t>((9 * 31 + 7) / 8));
  }
  for (auto &of : bits) targets.push_back({9 * 31, of.data()});
  layers[1].g[4] = NAN;
  layers[1].mask.clear();
  layers[2].layer.w.power = 0;
  layers[2].scores[7] = NAN;
  TopkStream stream(targets);
  for (const double high : {1.0, static_cast<double>(INFINITY)}) {
    stream.begin(20, -1.0, high);
    for (int64_t l = 2; l >= 0; --l) feed(random, stream, l, layers[static_cast<size_t>(l)]);
    CHECK(!stream.finish() && stream.nan() == 1);
  }
  stream.begin(20, -INFINITY, INFINITY);  // a source is missing
  feed(random, stream, 0, layers[0]);
  CHECK(!stream.finish() && stream.nan() == -1);
}

}  // namespace

void sweeps(Random &random, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    one_layer(random);
    one_stream(random, round % 5 == 0);
    not_a_number(random);
  }
}

}  // namespace check

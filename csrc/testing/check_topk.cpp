// Selection against a stable sort of exact values (long double holds value * 2**exponent without rounding).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "check.h"
#include "halves.h"
#include "topk.h"
#include "topk_band.h"

namespace check {
namespace {

using paikern::Ranking;
using paikern::ScoreSource;
using paikern::ScoreType;

struct Layer {
  std::vector<uint8_t> storage;     // the scores, or the weights, in their type
  std::vector<long double> values;  // what they count as, exponent and candidates applied
  std::vector<float> a, g;
  std::vector<uint8_t> candidates, bits;
  ScoreSource source;
};

float random_value(Random &random, int kind) {
  const float plain = static_cast<float>(static_cast<int32_t>(random())) * 0x1p-30f;
  switch (kind) {
    case 0:
      return plain;
    case 1:
      return static_cast<float>(below(random, 4)) - 1.0f;  // ties, and zero of both signs below
    case 2:
      return pick<float>(random, {0.0f, -0.0f, 1e-45f, -1e-45f, 1e-39f, 3e38f, INFINITY, -INFINITY, 1.0f});
    default:
      return 0.25f;
  }
}

// Appends the value in the storage type and returns what is really stored.
double store(std::vector<uint8_t> *storage, ScoreType type, float value) {
  const auto append = [&](const auto &word) {
    const auto *bytes = reinterpret_cast<const uint8_t *>(&word);
    storage->insert(storage->end(), bytes, bytes + sizeof(word));
  };
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint16_t top = static_cast<uint16_t>(bits >> 16);
  switch (type) {
    case ScoreType::kFloat32:
      append(value);
      return value;
    case ScoreType::kFloat64: {
      const double wide = std::isfinite(value) ? value * 1.1 : value;
      append(wide);
      return wide;
    }
    case ScoreType::kBfloat16:
      append(top);
      return paikern::bfloat16_to_float(top);
    default:  // the upper half of the bits is some float16, unless it is NaN
      const uint16_t half = std::isnan(paikern::float16_to_float(top)) ? 0x3c00 : top;
      append(half);
      return paikern::float16_to_float(half);
  }
}

void make_dense(Random &random, Layer *layer, int64_t numel) {
  const auto type = pick(random, {ScoreType::kFloat32, ScoreType::kFloat32, ScoreType::kBfloat16, ScoreType::kFloat16,
                                  ScoreType::kFloat64});
  const int kind = static_cast<int>(below(random, 4));
  layer->source.type = type;
  layer->source.absolute = below(random, 3) == 0;
  for (int64_t i = 0; i < numel; ++i) {
    const long double value = store(&layer->storage, type, random_value(random, kind));
    layer->values.push_back(layer->source.absolute ? std::fabs(value) : value);
  }
}

void make_factored(Random &random, Layer *layer, int64_t numel) {
  const int64_t columns = pick<int64_t>(random, {1, 3, 8, 70});
  const int64_t rows = numel / columns;
  const auto type = pick(random, {ScoreType::kFloat32, ScoreType::kBfloat16});
  for (int64_t i = 0; i < columns; ++i) layer->a.push_back(static_cast<float>(below(random, 5)));
  for (int64_t i = 0; i < rows; ++i) layer->g.push_back(static_cast<float>(below(random, 3)) * 0.5f);
  layer->source.type = type;
  layer->source.power = static_cast<int>(1 + below(random, 2));
  layer->source.columns = columns;
  if (below(random, 2) == 0) layer->candidates = random_bits(random, rows * columns, 6);
  for (int64_t i = 0; i < rows * columns; ++i) {
    const float w = static_cast<float>(std::fabs(store(&layer->storage, type, random_value(random, 0))));
    const float powered = layer->source.power == 1 ? w : w * w;
    const float score =
        (powered * layer->a[static_cast<size_t>(i % columns)]) * layer->g[static_cast<size_t>(i / columns)];
    const bool excluded = !layer->candidates.empty() && !bit(layer->candidates, i);
    layer->values.push_back(excluded ? -std::numeric_limits<long double>::infinity() : score);
  }
}

Layer make_layer(Random &random, bool exponents, bool factored) {
  Layer layer;
  const int64_t numel = pick<int64_t>(random, {0, 1, 7, 8, 9, 33, 600, 600, 5'000, 5'000, 70'000});
  if (factored) {
    make_factored(random, &layer, numel);
  } else {
    make_dense(random, &layer, numel);
  }
  layer.source.numel = static_cast<int64_t>(layer.values.size());
  layer.bits.assign(static_cast<size_t>((layer.source.numel + 7) / 8), 0xa5);
  if (exponents) layer.source.exponent = below(random, 200) - 100;
  for (long double &value : layer.values) value = std::ldexp(value, static_cast<int>(layer.source.exponent));
  return layer;
}

// Storage moves when layers do, so addresses are taken last.
std::vector<ScoreSource> sources_of(std::vector<Layer> &layers) {
  std::vector<ScoreSource> sources;
  for (Layer &layer : layers) {
    ScoreSource source = layer.source;
    source.data = layer.storage.data();
    source.a = layer.a.empty() ? nullptr : layer.a.data();
    source.g = layer.g.data();
    source.candidates = layer.candidates.empty() ? nullptr : layer.candidates.data();
    source.bits = layer.bits.data();
    sources.push_back(source);
  }
  return sources;
}

void check_ranking(const std::vector<Layer> &layers, const Ranking &ranking) {
  std::vector<std::pair<long double, bool>> scores;  // value, kept
  for (int64_t l = ranking.first; l < ranking.last; ++l) {
    const Layer &layer = layers[static_cast<size_t>(l)];
    for (int64_t i = 0; i < layer.source.numel; ++i) {
      scores.push_back({layer.values[static_cast<size_t>(i)], bit(layer.bits, i)});
    }
    for (int64_t i = layer.source.numel; i < 8 * static_cast<int64_t>(layer.bits.size()); ++i)
      CHECK(!bit(layer.bits, i));
  }
  std::stable_sort(scores.begin(), scores.end(), [](const auto &x, const auto &y) { return x.first > y.first; });
  for (size_t i = 0; i < scores.size(); ++i) CHECK(scores[i].second == (static_cast<int64_t>(i) < ranking.k));
}

ScoreSource plain(const std::vector<float> &data, std::vector<uint8_t> &bits) {
  ScoreSource source;
  source.data = data.data();
  source.numel = static_cast<int64_t>(data.size());
  source.bits = bits.data();
  return source;
}

// The sampled scores say nothing about the others: the guessed band misses the threshold, above it or below, and the
// exact passes must take over.
void misleading_sample(float sampled) {
  std::vector<float> scores(140'000);
  for (size_t i = 0; i < scores.size(); ++i) scores[i] = static_cast<float>(i * 7919 % scores.size());
  const paikern::TopkSample sample(static_cast<int64_t>(scores.size()));
  for (int64_t stretch = 0;; ++stretch) {
    const int64_t at = sample.position(stretch) / 32 * 32, end = std::min<int64_t>(at + 32, 140'000);
    if (at >= end) break;
    std::fill(scores.begin() + at, scores.begin() + end, sampled);
  }
  for (const int64_t k : {20'000, 70'000, 120'000}) {
    std::vector<uint8_t> bits(scores.size() / 8);
    CHECK(paikern::topk_mask({plain(scores, bits)}, {{0, 1, k}}) == -1);
    std::vector<int64_t> order(scores.size());
    std::iota(order.begin(), order.end(), 0);
    const auto value = [&](int64_t i) { return scores[static_cast<size_t>(i)]; };
    std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return value(x) > value(y); });
    for (size_t i = 0; i < order.size(); ++i) CHECK(bit(bits, order[i]) == (static_cast<int64_t>(i) < k));
    int64_t nan = 0;
    CHECK(paikern::kth_largest({plain(scores, bits)}, k, &nan) == value(order[static_cast<size_t>(k - 1)]));
  }
}

void refuse_nan(Random &random) {
  std::vector<float> clean(5'000, 1.0f), nan(static_cast<size_t>(pick<int64_t>(random, {9, 5'000, 70'000})), 2.0f);
  nan[static_cast<size_t>(below(random, static_cast<int64_t>(nan.size())))] = NAN;
  std::vector<uint8_t> first(625), second((nan.size() + 7) / 8);
  const int64_t total = static_cast<int64_t>(clean.size() + nan.size());
  for (const int64_t k : {int64_t{0}, int64_t{17}, total}) {
    CHECK(paikern::topk_mask({plain(clean, first), plain(nan, second)}, {{0, 2, k}}) == 1);
  }
}

}  // namespace

void topk(Random &random, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const bool exponents = below(random, 2) == 0, factored = below(random, 3) == 0;
    std::vector<Layer> layers;
    const int64_t count = 1 + below(random, 4);
    for (int64_t l = 0; l < count; ++l) layers.push_back(make_layer(random, exponents, factored));
    const auto sources = sources_of(layers);
    std::vector<Ranking> rankings;
    int64_t total = 0;
    for (const Layer &layer : layers) total += layer.source.numel;
    if (below(random, 2) == 0) {
      rankings.push_back({0, count, below(random, total + 1)});
    } else {
      for (int64_t l = 0; l < count; ++l) rankings.push_back({l, l + 1, below(random, sources[l].numel + 1)});
    }
    CHECK(paikern::topk_mask(sources, rankings) == -1);
    for (const Ranking &ranking : rankings) check_ranking(layers, ranking);
    if (!exponents && total > 0) {
      std::vector<long double> all;
      for (const Layer &layer : layers) all.insert(all.end(), layer.values.begin(), layer.values.end());
      const int64_t k = 1 + below(random, total);
      std::nth_element(all.begin(), all.begin() + (k - 1), all.end(), std::greater<long double>());
      int64_t nan = 0;
      CHECK(paikern::kth_largest(sources, k, &nan) == static_cast<double>(all[static_cast<size_t>(k - 1)]));
      CHECK(nan == -1);
    }
  }
  refuse_nan(random);
  for (const float sampled : {-1e9f, 1e9f}) misleading_sample(sampled);
}

}  // namespace check

// The native sweeps and the loops on them: conservation of paths, and rounds and steps against the same done one by
// one.
#include <cmath>
#include <limits>

#include "check.h"
#include "dpai_loop.h"
#include "path_rounds.h"
#include "topk.h"

namespace check {
namespace {

using paikern::DpaiLayer;
using paikern::FlowKind;
using paikern::FlowRules;
using paikern::FlowStep;
using paikern::FlowValue;
using paikern::PathFlow;
using paikern::PathGeometry;
using paikern::WeightType;

PathGeometry geometry(int64_t rows, int64_t channels, int64_t size, int64_t kernel, int64_t padding) {
  const int64_t out = size + 2 * padding - kernel + 1;
  return {1,
          1,
          rows,
          channels,
          {1, size, size},
          {1, kernel, kernel},
          {1, 1, 1},
          {0, padding, padding},
          {1, 1, 1},
          {1, out, out}};
}

// start -> conv 0 -> scale -> conv 1, added to its input -> max pool -> mean -> linear 2 -> linear 3; the mean by
// callback on request.
struct Network {
  static constexpr int64_t kLayers = 4;

  Network(Random &random, bool by_input_max, bool counts, int power, bool call) {
    const int64_t channels = 1 + below(random, 3), width = 2 + below(random, 19), size = 4 + below(random, 5);
    const int64_t hidden = 1 + below(random, 40), out = 1 + below(random, 9), half = size / 2;
    shapes = {channels * size * size,
              width * size * size,
              width * size * size,
              width * size * size,
              width * size * size,
              width * half * half,
              width,
              hidden,
              out};
    const PathGeometry geometries[kLayers] = {geometry(width, channels, size, 3, 1), geometry(width, width, size, 3, 1),
                                              geometry(hidden, width, 1, 1, 0), geometry(out, hidden, 1, 1, 0)};
    for (const int64_t numel : shapes) {
      a.emplace_back(static_cast<size_t>(numel));
      g.emplace_back(static_cast<size_t>(numel));
      divided.emplace_back(static_cast<size_t>(numel));
    }
    for (const PathGeometry &layer : geometries) {
      std::vector<float> values(static_cast<size_t>(layer.rows * layer.depth()));
      for (float &value : values) value = static_cast<float>(static_cast<int64_t>(random() % 2001) - 1000) / 1000.0f;
      weights.push_back(std::move(values));
    }
    for (int64_t c = 0; c < width; ++c) factors.push_back(0.5f + static_cast<float>(below(random, 100)) / 64.0f);
    argmax.resize(static_cast<size_t>(shapes[5]));
    std::vector<FlowValue> values(shapes.size());
    for (size_t i = 0; i < shapes.size(); ++i) values[i] = {a[i].data(), g[i].data(), shapes[i], i == 0};
    std::vector<FlowStep> steps;
    const auto add = [&](FlowKind kind, std::vector<int64_t> inputs, int64_t output) -> FlowStep & {
      FlowStep &step = steps.emplace_back();
      step.kind = kind;
      step.inputs = std::move(inputs);
      step.output = output;
      return step;
    };
    const auto weight = [&](int64_t layer, int64_t input, int64_t output) {
      FlowStep &step = add(FlowKind::kWeight, {input}, output);
      step.geometry = geometries[layer];
      const auto &data = weights[static_cast<size_t>(layer)];
      step.weight = {data.data(), nullptr, static_cast<int64_t>(data.size()), WeightType::kFloat32, power};
      step.parameter = layer;
      step.divided = divided[static_cast<size_t>(input)].data();
      step.channels = step.geometry.rows;
      step.inner = step.geometry.out_pixels();
      where.push_back(static_cast<int64_t>(steps.size()) - 1);
    };
    weight(0, 0, 1);
    FlowStep &scale = add(FlowKind::kScale, {1}, 2);
    scale.channels = width;
    scale.inner = size * size;
    scale.factor = power == 0 ? nullptr : factors.data();
    weight(1, 2, 3);
    add(FlowKind::kAdd, {2, 3}, 4);
    FlowStep &pool = add(FlowKind::kMaxPool, {4}, 5);
    pool.pool = {width, {size, size}, {half, half}, {2, 2}, {2, 2}, {0, 0}, {1, 1}};
    pool.argmax = argmax.data();
    FlowStep &mean = add(call ? FlowKind::kCall : FlowKind::kMean, {5}, 6);
    mean.outer = width;
    mean.channels = half * half;
    mean.average = true;
    weight(2, 6, 7);
    weight(3, 7, 8);
    part.resize(static_cast<size_t>(shapes[5]));
    const FlowStep replayed = mean;
    paikern::FlowCalls calls{
        [this, replayed](int64_t, const std::vector<int64_t> &) { mean_forward(replayed, a[5].data(), a[6].data()); },
        [this, replayed](int64_t) {
          mean_adjoint(replayed, g[6].data(), part.data());
          return std::vector<const float *>{part.data()};
        }};
    flow = std::make_unique<PathFlow>(std::move(values), std::move(steps), std::vector<int64_t>{8}, kLayers,
                                      FlowRules{by_input_max, counts}, std::move(calls));
  }

  int64_t numel(int64_t layer) const { return static_cast<int64_t>(weights[static_cast<size_t>(layer)].size()); }

  std::vector<int64_t> shapes, where;  // `where`: the step of each layer
  std::vector<std::vector<float>> a, g, divided, weights;
  std::vector<float> factors, part;
  std::vector<int32_t> argmax;
  std::unique_ptr<PathFlow> flow;
};

int64_t kept(const std::vector<uint8_t> &packed) {
  int64_t count = 0;
  for (const uint8_t byte : packed) count += __builtin_popcount(byte);
  return count;
}

// Every layer but the one beside the shortcut is a cut: its scores sum to R.
void conservation(Random &random) {
  Network net(random, false, false, 1 + static_cast<int>(below(random, 2)), below(random, 2) == 0);
  std::vector<std::vector<uint8_t>> masks;
  for (int64_t l = 0; l < Network::kLayers; ++l) masks.push_back(random_bits(random, net.numel(l), 8));
  for (int64_t l = 0; l < Network::kLayers; ++l) net.flow->set_mask(l, masks[static_cast<size_t>(l)].data());
  const double log_paths = net.flow->forward();
  if (!std::isfinite(log_paths)) return;
  net.flow->backward(
      [&](FlowStep &step, const float *x, const float *out_paths, int64_t exponent, const FlowValue &, float *) {
        if (step.parameter == 1) return false;
        std::vector<float> scores(static_cast<size_t>(step.weight.numel));
        paikern::path_score(step.geometry, step.weight, x, out_paths, 0.0f, scores.data());
        double sum = 0.0;
        for (const float score : scores) sum += static_cast<double>(score);
        CHECK(std::fabs(std::log(sum) + static_cast<double>(exponent) * std::log(2.0) - log_paths) < 1e-4);
        return false;
      });
}

// The rounds against sweeps, stored scores and a selection that knows nothing of earlier rounds.
void rounds(Random &random) {
  const int power = 1 + static_cast<int>(below(random, 2)), net_power = below(random, 3) == 0 ? 1 : power;
  Network net(random, false, false, net_power, below(random, 2) == 0);
  std::vector<std::vector<uint8_t>> bits[3];
  std::vector<paikern::RoundsLayer> layers;
  int64_t total = 0;
  for (int64_t l = 0; l < Network::kLayers; ++l) {
    const size_t bytes = static_cast<size_t>((net.numel(l) + 7) / 8);
    for (auto &set : bits) set.emplace_back(bytes, uint8_t{0});
    total += net.numel(l);
  }
  for (size_t l = 0; l < Network::kLayers; ++l)
    layers.push_back({net.where[l], {bits[0][l].data(), bits[1][l].data()}});
  paikern::PathRounds rounds(*net.flow, layers, power);
  const int count = 12;
  std::vector<std::vector<uint8_t>> expected;
  for (int round = 0; round < count; ++round) {
    const int64_t k = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(total) * std::pow(0.8, round + 1)));
    double log_flow;
    if (rounds.begin(&log_flow) != paikern::RoundsStatus::kDone) return;  // no path is left
    // Done apart: nothing but the maps of this round.
    std::vector<std::vector<float>> scores(Network::kLayers);
    std::vector<paikern::ScoreSource> sources(Network::kLayers);
    net.flow->backward([&](FlowStep &step, const float *x, const float *g, int64_t exponent, const FlowValue &,
                           float *) {
      const size_t l = static_cast<size_t>(step.parameter);
      scores[l].resize(static_cast<size_t>(step.weight.numel));
      paikern::WeightView w = step.weight;
      w.power = power;
      paikern::path_score(step.geometry, w, x, g, -1.0f, scores[l].data());
      // Products of three in the order of selections, since rounding decides near ties.
      if (step.geometry.linear()) {
        for (int64_t i = 0; i < w.numel; ++i) {
          float &score = scores[l][static_cast<size_t>(i)];
          const float value = std::fabs(net.weights[l][static_cast<size_t>(i)]);
          if (score != -1.0f)
            score =
                ((power == 2 ? value * value : value) * x[i % step.geometry.depth()]) * g[i / step.geometry.depth()];
        }
      }
      sources[l].data = scores[l].data();
      sources[l].numel = w.numel;
      sources[l].bits = bits[2][l].data();
      sources[l].exponent = exponent;
      sources[l].candidates = expected.empty() ? nullptr : expected[l].data();
      return false;
    });
    CHECK(paikern::topk_mask(sources, {{0, Network::kLayers, k}}) == -1);
    const paikern::RoundsStatus status = rounds.finish({k}, false);
    CHECK(status == paikern::RoundsStatus::kDone);
    expected = bits[2];
    CHECK(bits[rounds.current()] == expected);
  }
}

// Steps keep exactly what they should, and do not depend on how many are asked for at a time.
void steps(Random &random) {
  const bool published = below(random, 2) == 0, adam = below(random, 2) == 0;
  const uint32_t seed = random();
  std::vector<std::vector<float>> trained[2];
  std::vector<double> objectives[2];
  for (int way = 0; way < 2; ++way) {
    Random same(seed);
    Network net(same, published, !published, 0, way == 1);
    std::vector<std::vector<float>> s, m, v, q;
    std::vector<std::vector<uint8_t>> masks;
    std::vector<double> memory(2 * Network::kLayers, std::numeric_limits<double>::quiet_NaN());
    std::vector<DpaiLayer> layers;
    for (size_t l = 0; l < Network::kLayers; ++l) {
      s.push_back(net.weights[l]);
      m.emplace_back(s[l].size());
      v.emplace_back(s[l].size());
      q.emplace_back(s[l].size());
      masks.emplace_back((s[l].size() + 7) / 8);
    }
    for (size_t l = 0; l < Network::kLayers; ++l) {
      const FlowStep &step = net.flow->steps()[static_cast<size_t>(net.where[l])];
      const int64_t numel = net.numel(static_cast<int64_t>(l));
      DpaiLayer layer{s[l].data(),
                      adam ? m[l].data() : nullptr,
                      adam ? v[l].data() : nullptr,
                      masks[l].data(),
                      numel,
                      (numel + 1) / 2,
                      adam ? 0.01 : 0.5,
                      memory.data() + 2 * l,
                      nullptr,
                      {},
                      0,
                      false};
      if (l == 2) {  // summed first, as where a parameter is used twice
        layer.gathered = q[l].data();
        layer.update = step.geometry;
        layer.nodes = step.geometry.rows;
      }
      layers.push_back(layer);
    }
    paikern::DpaiLoop loop(*net.flow, layers, {0.7, 0.5, adam});
    CHECK(loop.select() == -1);
    std::vector<paikern::DpaiRecord> records;
    for (int64_t done = 0; done < 6;) {
      const size_t before = records.size();
      const auto status = loop.run(done, way == 0 ? 6 : 2, 1e9, 0, &records);
      if (status == paikern::DpaiStatus::kDead) break;
      CHECK(status == paikern::DpaiStatus::kDone);
      done += static_cast<int64_t>(records.size() - before);
    }
    for (size_t l = 0; l < Network::kLayers; ++l) CHECK(kept(masks[l]) == (static_cast<int64_t>(s[l].size()) + 1) / 2);
    for (const auto &record : records) objectives[way].push_back(record.objective);
    trained[way] = s;
  }
  CHECK(objectives[0] == objectives[1]);
  CHECK(trained[0] == trained[1]);
}

}  // namespace

void flow(Random &random, int count) {
  for (int i = 0; i < count; ++i) {
    conservation(random);
    rounds(random);
    steps(random);
  }
}

}  // namespace check

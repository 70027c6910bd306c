// Walks through a chain of random weights: every one is a chain of kernels that hold something, whatever the batch; and
// keeping against brute force.
#include <algorithm>
#include <cmath>
#include <set>

#include "check.h"
#include "phew.h"
#include "philox.h"

namespace check {
namespace {

struct Layer {
  std::vector<float> values;
  paikern::WalkWeight weight;
  int64_t inputs, outputs;

  int64_t row_of(int64_t bit) const { return (bit - weight.base) / weight.taps / weight.cols; }
  int64_t col_of(int64_t bit) const {
    return row_of(bit) / weight.group_rows() * weight.cols + (bit - weight.base) / weight.taps % weight.cols;
  }
  int64_t input_of(int64_t bit) const { return weight.transposed ? row_of(bit) : col_of(bit); }
  int64_t output_of(int64_t bit) const { return weight.transposed ? col_of(bit) : row_of(bit); }
};

// Layers whose groups and directions differ; `units` of each is the input of the next.
struct Chain {
  std::vector<Layer> layers;
  std::vector<paikern::WalkWeight> weights;
  std::vector<int64_t> nodes, slots, links;
  std::vector<int32_t> index, owner, starts;
  std::vector<float> tables;
  int64_t bits = 0;

  explicit Chain(Random &random) {
    const int64_t count = 1 + below(random, 4);
    int64_t units = 4 * (1 + below(random, 20)), table_size = 0;
    starts.resize(static_cast<size_t>(units));
    for (int64_t u = 0; u < units; ++u) starts[static_cast<size_t>(u)] = static_cast<int32_t>(u);
    add_node(0, -1, units, false);
    for (int64_t l = 0; l < count; ++l) {
      Layer layer;
      const int64_t outputs = 4 * (1 + below(random, 20)), groups = pick(random, {1, 1, 2, 4});
      const bool transposed = below(random, 3) == 0;
      auto &w = layer.weight;
      w = {nullptr,
           0,
           transposed ? units : outputs,
           (transposed ? outputs : units) / groups,
           pick(random, {1, 1, 4, 9}),
           groups,
           transposed,
           bits,
           table_size,
           0};
      w.by_col = table_size + w.rows * w.row_blocks();
      table_size = w.by_col + groups * w.cols * w.col_blocks();
      layer.inputs = units;
      layer.outputs = outputs;
      layer.values.resize(static_cast<size_t>(w.rows * w.cols * w.taps));
      const int64_t zeros = below(random, 10);
      for (float &v : layer.values) v = below(random, 10) < zeros ? 0.0f : static_cast<float>(below(random, 9) - 4);
      bits += (w.rows * w.cols * w.taps + 7) / 8 * 8;
      add_list(l, units);
      layers.push_back(std::move(layer));
      add_node(1, l, outputs, true);
      units = outputs;
    }
    add_list(count, units);
    add_node(3, -1, units, true);
    for (Layer &layer : layers) {
      layer.weight.data = layer.values.data();
      weights.push_back(layer.weight);
    }
    tables.resize(static_cast<size_t>(table_size));
  }

  // Unit u of node `from` meets unit u of the next one.
  void add_list(int64_t from, int64_t units) {
    const int64_t first = nodes[static_cast<size_t>(8 * from + 2)];
    links.insert(links.end(), {from, one_to_one(units, 0)});
    slots.insert(slots.end(), {from + 1, one_to_one(units, first)});
  }

  int64_t one_to_one(int64_t units, int64_t shift) {
    const auto begin = static_cast<int64_t>(index.size());
    for (int64_t u = 0; u <= units; ++u) index.push_back(static_cast<int32_t>(begin + units + 1 + u));
    for (int64_t u = 0; u < units; ++u) index.push_back(static_cast<int32_t>(shift + u));
    return begin;
  }

  void add_node(int64_t kind, int64_t weight, int64_t units, bool slot) {
    const auto number = static_cast<int64_t>(nodes.size() / 8), first = static_cast<int64_t>(owner.size());
    nodes.insert(nodes.end(),
                 {kind, weight, first, units, number, kind == 3 ? number : number + 1, number - slot, number});
    owner.resize(owner.size() + static_cast<size_t>(units), static_cast<int32_t>(number));
  }

  paikern::WalkGraph graph() const {
    const auto last = static_cast<int64_t>(nodes.size() / 8) - 1;
    return {nodes.data(),
            slots.data(),
            links.data(),
            index.data(),
            owner.data(),
            starts.data(),
            static_cast<int64_t>(starts.size()),
            nodes[nodes.size() - 5],
            last};
  }
};

void one_walk(const Chain &chain, const int64_t *walk, int64_t number) {
  const bool forwards = number % 2 == 0;
  const auto count = static_cast<int64_t>(chain.layers.size());
  const int64_t turn = number / 2;
  int64_t unit = forwards ? turn % chain.layers[0].inputs : turn % chain.layers.back().outputs;
  for (int64_t step = 0; step < count; ++step) {
    const Layer &layer = chain.layers[static_cast<size_t>(forwards ? step : count - 1 - step)];
    const int64_t bit = walk[step], at = bit - layer.weight.base;
    CHECK(at >= 0 && at < static_cast<int64_t>(layer.values.size()));
    CHECK((forwards ? layer.input_of(bit) : layer.output_of(bit)) == unit);
    unit = forwards ? layer.output_of(bit) : layer.input_of(bit);
    if (layer.values[static_cast<size_t>(at)] == 0.0f) {  // only where all there was to draw from is zero
      const int64_t kernel = at / layer.weight.taps * layer.weight.taps;
      for (int64_t t = 0; t < layer.weight.taps; ++t) CHECK(layer.values[static_cast<size_t>(kernel + t)] == 0.0f);
    }
  }
}

void keeping(Random &random) {
  const int64_t width = 1 + below(random, 5), count = below(random, 80), size = 1 + below(random, 12);
  std::vector<int64_t> walks(static_cast<size_t>(count * width));
  for (int64_t &bit : walks) bit = below(random, 8 * size + 3) - 3;
  const int64_t target = below(random, 8 * size + 2);
  const bool exact = below(random, 2) == 0;
  std::set<int64_t> kept;
  for (int64_t w = 0; w < count && static_cast<int64_t>(kept.size()) < target; ++w) {
    std::set<int64_t> with = kept;
    for (int64_t j = 0; j < width && walks[static_cast<size_t>(w * width + j)] >= 0; ++j) {
      with.insert(walks[static_cast<size_t>(w * width + j)]);
    }
    if (!exact || static_cast<int64_t>(with.size()) <= target) kept = with;
  }
  std::vector<uint8_t> bits(static_cast<size_t>(size), 0);
  paikern::WalkState state = {};
  const int64_t half = count / 2;
  paikern::phew_keep(bits.data(), state, walks.data(), half, width, target, 1, exact);
  paikern::phew_keep(bits.data(), state, walks.data() + half * width, count - half, width, target, 1, exact);
  CHECK(state.kept == static_cast<int64_t>(kept.size()));
  for (int64_t b = 0; b < 8 * size; ++b) CHECK(bit(bits, b) == (kept.count(b) == 1));
}

}  // namespace

void phew(Random &random, int rounds) {
  const std::array<uint32_t, 4> known = {0x6627E8D5u, 0xE169C58Du, 0xBC57AC4Cu, 0x9B00DBD8u};
  CHECK(paikern::philox({0, 0, 0, 0}, 0) == known);
  for (int round = 0; round < rounds; ++round) {
    Chain chain(random);
    const int weighting = static_cast<int>(below(random, 3));
    paikern::phew_tables(chain.weights, weighting, chain.tables.data());
    for (const float share : chain.tables) CHECK(share >= 0.0f && share <= 1.0f);
    const auto width = static_cast<int64_t>(chain.layers.size());
    const int64_t count = 1 + below(random, 300), first = below(random, 1000), half = count / 2;
    std::vector<int64_t> walks(static_cast<size_t>(count * width)), parts(walks.size());
    const auto walk = [&](int64_t from, int64_t number, int64_t *out) {
      paikern::phew_walks(chain.weights, chain.tables.data(), chain.graph(), 7, from, number, width, weighting, false,
                          out);
    };
    walk(first, count, walks.data());
    walk(first, half, parts.data());
    walk(first + half, count - half, parts.data() + half * width);
    CHECK(walks == parts);
    for (int64_t w = 0; w < count; ++w) one_walk(chain, walks.data() + w * width, first + w);
    keeping(random);
  }
}

}  // namespace check

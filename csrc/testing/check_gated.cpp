// The two gated networks of PX against loops in double precision. Inputs, weights and shifts are small multiples of one
// half, so that every sum before the last layer is exact and no gate can fall either way.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "gated.h"

namespace check {
namespace {

using paikern::GatedKind;
using paikern::GatedMap;
using paikern::GatedProgram;
using paikern::GatedStep;
using paikern::GatedWeight;

struct Values {
  std::vector<double> f, g;
};

struct Layer {
  GatedStep step;
  std::vector<float> theta, scale, shift;
  std::vector<uint8_t> mask;
};

int64_t size_of(const GatedMap &map) { return map.channels * map.h * map.w; }

// A network as it is built up: the value of a step is the next map.
struct Network {
  explicit Network(Random &random) : random(random) {
    maps.push_back({1 + below(random, 3), 3 + below(random, 9), 1 + below(random, 20)});
  }

  int64_t last() const { return static_cast<int64_t>(maps.size()) - 1; }

  GatedStep &push(GatedKind kind, int64_t in, const GatedMap &out) {
    maps.push_back(out);
    layers.emplace_back();
    GatedStep &step = layers.back().step;
    step = {kind, in, last(), -1, false, false, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}};
    return step;
  }

  // The output size that a window leaves; axis 0 is h.
  static int64_t reduced(const GatedStep &s, int axis, int64_t size) {
    return (size + 2 * s.padding[axis] - s.dilation[axis] * (s.kernel[axis] - 1) - 1) / s.stride[axis] + 1;
  }

  void window(GatedStep &s, const GatedMap &in, bool pool) {
    const int64_t size[2] = {in.h, in.w};
    for (int axis = 0; axis < 2; ++axis) {
      s.kernel[axis] = 1 + below(random, 4);
      s.dilation[axis] = size[axis] > 2 ? 1 + below(random, 2) : 1;  // a pool reads at least one pixel
      s.stride[axis] = 1 + below(random, 3);
      s.padding[axis] = pool ? s.kernel[axis] / 2 : below(random, 3);
      if (reduced(s, axis, size[axis]) < 1) s.kernel[axis] = s.dilation[axis] = 1;
      if (pool) s.padding[axis] = std::min(s.padding[axis], s.kernel[axis] / 2);
    }
  }

  void weights(int64_t density) {
    Layer &layer = layers.back();
    const int64_t rows = maps.back().channels;
    const GatedStep &s = layer.step;
    const int64_t channels = maps[static_cast<size_t>(s.in)].channels;
    const int64_t numel = rows * (channels / s.groups) * s.kernel[0] * s.kernel[1];
    for (int64_t i = 0; i < numel; ++i) layer.theta.push_back(static_cast<float>(below(random, 5) - 2));
    if (density < 10) layer.mask = random_bits(random, numel, density);
    affine();
  }

  void affine() {
    for (int64_t r = 0; r < maps.back().channels; ++r) {
      layers.back().scale.push_back(pick(random, {0.5f, 1.0f, -1.0f}));
      layers.back().shift.push_back(static_cast<float>(below(random, 9) - 4) / 2.0f);
    }
  }

  void convolution(int64_t in, int64_t density) {
    const GatedMap &from = maps[static_cast<size_t>(in)];
    GatedStep s{GatedKind::kWeight, in, 0, -1, below(random, 4) != 0, false, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}};
    int64_t rows = 1 + below(random, 11);
    if (below(random, 3) == 0) {
      s.groups = below(random, 2) == 0 ? from.channels : 1;
      rows = s.groups * (1 + below(random, 5));
    }
    window(s, from, false);
    const GatedMap to{rows, reduced(s, 0, from.h), reduced(s, 1, from.w)};
    GatedStep &made = push(GatedKind::kWeight, in, to);
    s.out = made.out;
    made = s;
    weights(density);
  }

  // 3 x 3, as wide as its input, which is added to it.
  void residual(int64_t in, int64_t density) {
    const GatedMap from = maps[static_cast<size_t>(in)];
    GatedStep &s = push(GatedKind::kWeight, in, from);
    for (int axis = 0; axis < 2; ++axis) {
      s.kernel[axis] = 3;
      s.padding[axis] = 1;
    }
    s.add = in;
    s.gate = true;
    weights(density);
  }

  Random &random;
  std::vector<GatedMap> maps;
  std::vector<Layer> layers;
};

void weigh(const Layer &layer, const GatedMap &in, const GatedMap &out, const Values &x, Values &y) {
  const GatedStep &s = layer.step;
  const int64_t channels = in.channels / s.groups, group_rows = out.channels / s.groups;
  for (int64_t r = 0, i = 0; r < out.channels; ++r) {
    for (int64_t h = 0; h < out.h; ++h) {
      for (int64_t w = 0; w < out.w; ++w, ++i) {
        double f = 0.0, g = 0.0;
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t u = 0; u < s.kernel[0]; ++u) {
            for (int64_t v = 0; v < s.kernel[1]; ++v) {
              const int64_t p = h * s.stride[0] - s.padding[0] + u * s.dilation[0];
              const int64_t q = w * s.stride[1] - s.padding[1] + v * s.dilation[1];
              const int64_t at = ((r * channels + c) * s.kernel[0] + u) * s.kernel[1] + v;
              if (p < 0 || p >= in.h || q < 0 || q >= in.w || (!layer.mask.empty() && !bit(layer.mask, at))) continue;
              const int64_t from = ((r / group_rows * channels + c) * in.h + p) * in.w + q;
              f += static_cast<double>(layer.theta[static_cast<size_t>(at)]) * x.f[static_cast<size_t>(from)];
              g += x.g[static_cast<size_t>(from)];
            }
          }
        }
        y.f[static_cast<size_t>(i)] = f;
        y.g[static_cast<size_t>(i)] = g;
      }
    }
  }
}

void pool(const GatedStep &s, const GatedMap &in, const GatedMap &out, const Values &x, Values &y) {
  for (int64_t c = 0, i = 0; c < out.channels; ++c) {
    for (int64_t h = 0; h < out.h; ++h) {
      for (int64_t w = 0; w < out.w; ++w, ++i) {
        double best = -INFINITY, paths = 0.0, at_best = 0.0;
        for (int64_t u = 0; u < s.kernel[0]; ++u) {
          for (int64_t v = 0; v < s.kernel[1]; ++v) {
            const int64_t p = h * s.stride[0] - s.padding[0] + u * s.dilation[0];
            const int64_t q = w * s.stride[1] - s.padding[1] + v * s.dilation[1];
            if (p < 0 || p >= in.h || q < 0 || q >= in.w) continue;
            const size_t from = static_cast<size_t>((c * in.h + p) * in.w + q);
            if (x.f[from] > best) at_best = x.g[from];
            best = std::max(best, x.f[from]);
            paths = std::max(paths, x.g[from]);
          }
        }
        y.f[static_cast<size_t>(i)] = best;
        y.g[static_cast<size_t>(i)] = s.pool_gate ? at_best : paths;
      }
    }
  }
}

Values run_step(const Network &net, const Layer &layer, const std::vector<Values> &values) {
  const GatedStep &s = layer.step;
  const GatedMap &in = net.maps[static_cast<size_t>(s.in)], &out = net.maps[static_cast<size_t>(s.out)];
  const Values &x = values[static_cast<size_t>(s.in)];
  Values y{std::vector<double>(static_cast<size_t>(size_of(out))), {}};
  y.g = y.f;
  if (s.kind == GatedKind::kWeight) weigh(layer, in, out, x, y);
  if (s.kind == GatedKind::kMaxPool) pool(s, in, out, x, y);
  if (s.kind == GatedKind::kElementwise || s.kind == GatedKind::kReshape) y = x;
  const int64_t pixels = in.h * in.w;
  for (int64_t c = 0; s.kind == GatedKind::kMean && c < in.channels; ++c) {
    for (int64_t i = 0; i < pixels; ++i) {
      y.f[static_cast<size_t>(c)] += x.f[static_cast<size_t>(c * pixels + i)] / static_cast<double>(pixels);
      y.g[static_cast<size_t>(c)] += x.g[static_cast<size_t>(c * pixels + i)] / static_cast<double>(pixels);
    }
  }
  if (s.kind != GatedKind::kWeight && s.kind != GatedKind::kElementwise) return y;
  for (size_t i = 0; i < y.f.size(); ++i) {
    const size_t row = i / static_cast<size_t>(out.h * out.w);
    y.f[i] = y.f[i] * static_cast<double>(layer.scale[row]) + static_cast<double>(layer.shift[row]);
    if (s.add >= 0) {
      y.f[i] += values[static_cast<size_t>(s.add)].f[i];
      y.g[i] += values[static_cast<size_t>(s.add)].g[i];
    }
    if (s.gate && !(y.f[i] > 0.0)) y.f[i] = y.g[i] = 0.0;
  }
  return y;
}

void compare(Random &random) {
  Network net(random);
  const int64_t density = pick(random, {1, 3, 5, 8, 10});
  net.convolution(0, density);
  if (below(random, 2) == 0) {
    net.push(GatedKind::kElementwise, net.last(), net.maps.back()).gate = below(random, 2) == 0;
    net.affine();
  }
  net.residual(net.last(), density);
  if (below(random, 2) == 0) net.convolution(net.last(), pick(random, {1, 4, 7}));
  if (below(random, 2) == 0) {
    const GatedMap from = net.maps.back();
    GatedStep s{
        GatedKind::kMaxPool, net.last(), 0, -1, false, below(random, 2) == 0, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}};
    net.window(s, from, true);
    const GatedMap to{from.channels, Network::reduced(s, 0, from.h), Network::reduced(s, 1, from.w)};
    GatedStep &made = net.push(GatedKind::kMaxPool, net.last(), to);
    s.out = made.out;
    made = s;
  }
  const GatedMap end = net.maps.back();
  if (below(random, 2) == 0) {
    net.push(GatedKind::kMean, net.last(), {end.channels, 1, 1});
  } else {
    net.push(GatedKind::kReshape, net.last(), {size_of(end), 1, 1});
  }
  net.push(GatedKind::kWeight, net.last(), {1 + below(random, 6), 1, 1});
  net.weights(density);

  std::vector<GatedStep> steps;
  for (const Layer &layer : net.layers) steps.push_back(layer.step);
  GatedProgram program(net.maps, steps, net.last());
  std::vector<GatedWeight> weights;
  for (size_t i = 0; i < net.layers.size(); ++i) {
    const Layer &layer = net.layers[i];
    if (layer.scale.empty()) continue;
    weights.push_back({static_cast<int64_t>(i), layer.theta.empty() ? nullptr : layer.theta.data(),
                       layer.mask.empty() ? nullptr : layer.mask.data(), layer.scale.data(), layer.shift.data()});
  }
  program.load(weights);
  const int64_t samples = 1 + below(random, 40), each = size_of(net.maps[0]), outputs = net.maps.back().channels;
  std::vector<float> x(static_cast<size_t>(samples * each)), f(static_cast<size_t>(samples * outputs));
  for (float &value : x) value = static_cast<float>(below(random, 5) - 2);
  std::vector<double> total(static_cast<size_t>(outputs)), expected(total.size(), 0.0);
  const int64_t exponent = program.run(x.data(), samples, total.data(), f.data());

  for (int64_t n = 0; n < samples; ++n) {
    std::vector<Values> values(1);
    for (int64_t i = 0; i < each; ++i) {
      const double value = static_cast<double>(x[static_cast<size_t>(n * each + i)]);
      values[0].f.push_back(value);
      values[0].g.push_back(value * value);
    }
    for (const Layer &layer : net.layers) values.push_back(run_step(net, layer, values));
    double terms = 1.0;  // what the last sum adds up, at most
    for (const double value : values[values.size() - 2].f) terms += 2.0 * std::fabs(value);
    for (int64_t k = 0; k < outputs; ++k) {
      const size_t at = static_cast<size_t>(k);
      CHECK(std::fabs(static_cast<double>(f[static_cast<size_t>(n * outputs + k)]) - values.back().f[at]) <=
            1e-5 * terms);
      expected[at] += values.back().g[at];
    }
  }
  for (size_t k = 0; k < total.size(); ++k) {
    CHECK(std::fabs(std::ldexp(total[k], static_cast<int>(exponent)) - expected[k]) <= 1e-5 * expected[k]);
  }
  // The same again, in which nothing of the last run may be left.
  std::vector<double> again(total.size());
  CHECK(program.run(x.data(), samples, again.data(), nullptr) == exponent);
  CHECK(again == total);
}

}  // namespace

void gated(Random &random, int rounds) {
  for (int i = 0; i < 4 * rounds; ++i) compare(random);
}

}  // namespace check

// Convolutions with packed weights against double precision, in buffers of exactly the size that is promised.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"
#include "halves.h"
#include "masked_conv.h"
#include "masked_linear.h"

namespace check {
namespace {

using paikern::ConvEntries;
using paikern::ConvMap;
using paikern::ConvShape;
using paikern::WeightType;

// A map with the values that the kernels see, and as it is stored.
struct Map {
  Map(Random &random, int64_t count, WeightType kind) : type(kind), values(static_cast<size_t>(count)) {
    std::normal_distribution<float> normal;
    for (float &value : values) {
      value = normal(random);
      if (type != WeightType::kBfloat16) continue;
      uint32_t word;
      std::memcpy(&word, &value, 4);
      halves.push_back(static_cast<uint16_t>(word >> 16));
      value = paikern::bfloat16_to_float(halves.back());
    }
  }

  ConvMap view() const {
    return {type == WeightType::kFloat32 ? static_cast<const void *>(values.data()) : halves.data(), type};
  }

  WeightType type;
  std::vector<float> values;
  std::vector<uint16_t> halves;
};

struct Sum {
  double value = 0.0, magnitude = 0.0;
  void add(double term) {
    value += term;
    magnitude += std::fabs(term);
  }
  void close(float found) const { CHECK(std::fabs(found - value) <= 1e-5 * magnitude + 1e-30); }
};

ConvShape random_shape(Random &random) {
  ConvShape s{below(random, 20), pick<int64_t>(random, {1, 1, 2, 3}), 0, 0, {}, {}, {}, {}, {}, {}};
  s.rows = s.groups * (1 + below(random, 6));
  s.channels = s.groups * (1 + below(random, 6));
  const bool point = below(random, 4) == 0;  // they take a way of their own
  for (int a = 0; a < 2; ++a) {
    s.kernel[a] = point ? 1 : 1 + below(random, 4);
    s.stride[a] = point ? 1 : 1 + below(random, 3);
    s.padding[a] = point ? 0 : below(random, 3);
    s.dilation[a] = 1 + below(random, 2);
    const int64_t reach = s.dilation[a] * (s.kernel[a] - 1) + 1 - 2 * s.padding[a];
    s.size[a] = std::max<int64_t>(reach, 1) + below(random, 12);
    s.out[a] = (s.size[a] - reach) / s.stride[a] + 1;
  }
  return s;
}

// Calls visit(entry, place in y, place in x) for every product that the convolution is made of.
template <class Visit>
void each_product(const ConvShape &s, const std::vector<int64_t> &where, Visit visit) {
  const int64_t group_rows = s.rows / s.groups, group_channels = s.channels / s.groups;
  const int64_t columns = group_channels * s.taps();
  for (size_t i = 0; i < where.size(); ++i) {
    const int64_t r = where[i] / columns, column = where[i] % columns, tap = column % s.taps();
    const int64_t c = r / group_rows * group_channels + column / s.taps();
    for (int64_t n = 0; n < s.batch; ++n) {
      for (int64_t q = 0; q < s.out_pixels(); ++q) {
        const int64_t h = q / s.out[1] * s.stride[0] - s.padding[0] + tap / s.kernel[1] * s.dilation[0];
        const int64_t w = q % s.out[1] * s.stride[1] - s.padding[1] + tap % s.kernel[1] * s.dilation[1];
        if (h < 0 || h >= s.size[0] || w < 0 || w >= s.size[1]) continue;
        visit(i, static_cast<size_t>((n * s.rows + r) * s.out_pixels() + q),
              static_cast<size_t>((n * s.channels + c) * s.pixels() + h * s.size[1] + w));
      }
    }
  }
}

void one(Random &random) {
  const ConvShape s = random_shape(random);
  const int64_t columns = s.channels / s.groups * s.taps(), panel = pick<int64_t>(random, {1, 16, 4096});
  const auto bits = random_bits(random, s.rows * columns, pick<int64_t>(random, {0, 1, 5, 10}));
  std::vector<int64_t> where;
  for (int64_t i = 0; i < s.rows * columns; ++i) {
    if (bit(bits, i)) where.push_back(i);
  }
  const size_t kept = where.size();
  const auto panels = [panel](int64_t wide) { return (wide + panel - 1) / panel; };
  std::vector<uint16_t> positions(kept), back(kept);
  std::vector<int32_t> starts(static_cast<size_t>(s.rows * panels(columns) + 1)), source(kept);
  std::vector<int32_t> begins(static_cast<size_t>(columns * panels(s.rows) + 1));
  paikern::list_positions(bits.data(), s.rows, columns, panel, positions.data(), starts.data());
  paikern::PackedView view{};
  view.positions = positions.data();
  view.starts = starts.data();
  view.rows = s.rows;
  view.columns = columns;
  view.panel = panel;
  paikern::transpose_positions(view, panel, back.data(), begins.data(), source.data());

  const auto type = pick<WeightType>(random, {WeightType::kFloat32, WeightType::kBfloat16});
  const Map x(random, s.batch * s.channels * s.pixels(), type), g(random, s.batch * s.rows * s.out_pixels(), type);
  const Map v(random, static_cast<int64_t>(kept), WeightType::kFloat32), bias(random, s.rows, WeightType::kFloat32);
  const ConvEntries entries{v.values.data(), nullptr, positions.data(), starts.data(), s.rows, columns, panel};
  const ConvEntries transposed{v.values.data(), source.data(), back.data(), begins.data(), columns, s.rows, panel};

  std::vector<float> y(g.values.size(), 77.0f), dx(x.values.size(), 77.0f), dv(kept, 77.0f);
  const bool add = below(random, 2);
  paikern::masked_conv2d(s, entries, x.view(), add ? bias.values.data() : nullptr, y.data());
  paikern::masked_conv2d_input(s, transposed, g.view(), dx.data());
  paikern::masked_conv2d_kept(s, entries, g.view(), x.view(), dv.data());

  std::vector<Sum> by_y(y.size()), by_x(dx.size()), by_v(kept);
  each_product(s, where, [&](size_t i, size_t o, size_t p) {
    by_y[o].add(static_cast<double>(v.values[i]) * x.values[p]);
    by_x[p].add(static_cast<double>(v.values[i]) * g.values[o]);
    by_v[i].add(static_cast<double>(g.values[o]) * x.values[p]);
  });
  for (size_t o = 0; o < y.size(); ++o) {
    const auto row = static_cast<size_t>(static_cast<int64_t>(o) / s.out_pixels() % s.rows);
    if (add) by_y[o].add(bias.values[row]);
    by_y[o].close(y[o]);
  }
  for (size_t p = 0; p < dx.size(); ++p) by_x[p].close(dx[p]);
  for (size_t i = 0; i < kept; ++i) by_v[i].close(dv[i]);
}

}  // namespace

void masked_conv(Random &random, int rounds) {
  for (int i = 0; i < 2 * rounds; ++i) one(random);
}

}  // namespace check

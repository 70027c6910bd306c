// Path products, scores and the DPaI update against loops over every path. Weights are quarters and maps small
// integers, so that every sum is exact in float32 and the comparison needs no tolerance.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"
#include "path.h"
#include "path_compact.h"
#include "path_few.h"

namespace check {
namespace {

using paikern::PathGeometry;
using paikern::WeightType;
using paikern::WeightView;

struct Weight {
  std::vector<uint8_t> storage, mask;
  std::vector<float> values;  // |w|**power where kept, else 0
  WeightView view;
};

Weight make_weight(Random &random, int64_t numel) {
  Weight weight;
  const auto type = pick(random, {WeightType::kFloat32, WeightType::kBfloat16, WeightType::kFloat16});
  const int power = static_cast<int>(below(random, 3));
  if (below(random, 2) == 0) weight.mask = random_bits(random, numel, pick<int64_t>(random, {0, 1, 5, 10}));
  for (int64_t i = 0; i < numel; ++i) {
    const float value = static_cast<float>(below(random, 9) - 4) * 0.25f;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint16_t brain = static_cast<uint16_t>(bits >> 16);
    // The same exponent and mantissa, rebiased: quarters are normal in float16, or zero.
    const uint16_t half = static_cast<uint16_t>(
        (bits >> 16 & 0x8000u) | ((bits & 0x7fffffffu) == 0 ? 0 : ((bits & 0x7fffffffu) - 0x38000000u) >> 13));
    const auto append = [&](const auto &word) {
      const auto *bytes = reinterpret_cast<const uint8_t *>(&word);
      weight.storage.insert(weight.storage.end(), bytes, bytes + sizeof(word));
    };
    if (type == WeightType::kFloat32) append(value);
    if (type == WeightType::kBfloat16) append(brain);
    if (type == WeightType::kFloat16) append(half);
    const float powered = power == 0 ? 1.0f : power == 1 ? std::fabs(value) : value * value;
    weight.values.push_back(weight.mask.empty() || bit(weight.mask, i) ? powered : 0.0f);
  }
  weight.view = {power == 0 ? nullptr : weight.storage.data(), weight.mask.empty() ? nullptr : weight.mask.data(),
                 numel, type, power};
  return weight;
}

std::vector<float> integers(Random &random, int64_t numel) {
  std::vector<float> values(static_cast<size_t>(numel));
  for (float &value : values) value = static_cast<float>(below(random, 4));
  return values;
}

// Calls visit(weight index, index into the column map, index into the row map) for every path of one step.
template <class Visit>
void for_paths(const PathGeometry &g, Visit visit) {
  const auto inside = [](int64_t at, int64_t size) { return at >= 0 && at < size; };
  for (int64_t b = 0; b < g.batch; ++b) {
    for (int64_t o = 0; o < g.rows; ++o) {
      for (int64_t c = 0; c < g.group_channels(); ++c) {
        const int64_t channel = o / g.group_rows() * g.group_channels() + c;
        for (int64_t tap = 0; tap < g.taps(); ++tap) {
          const int64_t k[3] = {tap / (g.kernel[1] * g.kernel[2]), tap / g.kernel[2] % g.kernel[1], tap % g.kernel[2]};
          for (int64_t pixel = 0; pixel < g.out_pixels(); ++pixel) {
            const int64_t p[3] = {pixel / (g.out[1] * g.out[2]), pixel / g.out[2] % g.out[1], pixel % g.out[2]};
            int64_t at[3];
            bool exists = true;
            for (int axis = 0; axis < 3; ++axis) {
              at[axis] = p[axis] * g.stride[axis] - g.padding[axis] + k[axis] * g.dilation[axis];
              exists = exists && inside(at[axis], g.size[axis]);
            }
            if (!exists) continue;
            const int64_t column = (at[0] * g.size[1] + at[1]) * g.size[2] + at[2];
            visit(static_cast<size_t>((o * g.group_channels() + c) * g.taps() + tap),
                  static_cast<size_t>((b * g.channels + channel) * g.pixels() + column),
                  static_cast<size_t>((b * g.rows + o) * g.out_pixels() + pixel));
          }
        }
      }
    }
  }
}

void dpai(Random &random, const PathGeometry &g, const std::vector<float> &x, const std::vector<float> &z,
          const std::vector<float> &q) {
  const int64_t numel = static_cast<int64_t>(q.size());
  const bool by_channel = below(random, 2) == 0, adam = below(random, 2) == 0;
  const auto mask = random_bits(random, numel, 5);
  std::vector<float> s, m(q.size(), 0.5f), v(q.size(), 0.25f);
  for (int64_t i = 0; i < numel; ++i) s.push_back(static_cast<float>(below(random, 5) - 2));
  std::vector<uint8_t> live(static_cast<size_t>(by_channel ? g.channels : g.rows));
  for (uint8_t &node : live) node = static_cast<uint8_t>(below(random, 2));
  const paikern::DpaiRule rule{0.5f, 0.25f, 0.75f, 0.125f, 0.9f, 0.999f, 1.0f, 1e-8f};
  auto other_s = s, other_m = m, other_v = v;
  const auto state = [&](std::vector<float> &scores, std::vector<float> &first, std::vector<float> &second) {
    return paikern::DpaiState{
        scores.data(), adam ? first.data() : nullptr, adam ? second.data() : nullptr, mask.data(), live.data(),
        by_channel};
  };
  const auto fused = paikern::dpai_step(g, state(s, m, v), rule, x.data(), z.data());
  const auto given = paikern::dpai_update(g, state(other_s, other_m, other_v), rule, q.data());
  CHECK(s == other_s && m == other_m && v == other_v);
  CHECK(fused.weights == given.weights && fused.kernels == given.kernels && fused.finite && given.finite);
}

void check_geometry(Random &random, const PathGeometry &g) {
  const int64_t numel = g.rows * g.depth();
  const Weight weight = make_weight(random, numel);
  const auto x = integers(random, g.batch * g.channels * g.pixels());
  const auto z = integers(random, g.batch * g.rows * g.out_pixels());
  std::vector<float> forward(z.size(), NAN), backward(x.size(), NAN), score(static_cast<size_t>(numel), NAN);
  std::vector<float> wanted_forward(z.size()), wanted_backward(x.size()), q(static_cast<size_t>(numel));
  for_paths(g, [&](size_t w, size_t column, size_t row) {
    wanted_forward[row] += weight.values[w] * x[column];
    wanted_backward[column] += weight.values[w] * z[row];
    q[w] += x[column] * z[row];
  });
  paikern::path_forward(g, weight.view, x.data(), forward.data());
  paikern::path_backward(g, weight.view, z.data(), backward.data());
  paikern::path_score(g, weight.view, x.data(), z.data(), -1.0f, score.data());
  CHECK(forward == wanted_forward);
  CHECK(backward == wanted_backward);
  for (size_t i = 0; i < score.size(); ++i) {
    const bool pruned = !weight.mask.empty() && !bit(weight.mask, static_cast<int64_t>(i));
    CHECK(score[i] == (pruned ? -1.0f : weight.values[i] * q[i]));
  }
  dpai(random, g, x, z, q);
}

// Lists of kept weights, and what is left of them after two more masks.
void compact(Random &random, const PathGeometry &g, const Weight &weight) {
  if (g.groups != 1 || g.linear() || weight.view.power == 0) return;
  const int64_t numel = g.rows * g.depth();
  const auto x = integers(random, g.batch * g.channels * g.pixels());
  const auto z = integers(random, g.batch * g.rows * g.out_pixels());
  paikern::CompactLayer layer(g, weight.view);
  std::vector<uint8_t> mask = weight.mask;
  for (int round = 0; round < 3; ++round) {
    std::vector<float> wanted_forward(z.size()), wanted_backward(x.size()), q(static_cast<size_t>(numel));
    for_paths(g, [&](size_t w, size_t column, size_t row) {
      const float value = bit(mask, static_cast<int64_t>(w)) ? weight.values[w] : 0.0f;
      wanted_forward[row] += value * x[column];
      wanted_backward[column] += value * z[row];
      q[w] += x[column] * z[row];
    });
    std::vector<float> forward(z.size(), NAN), backward(x.size(), NAN), scores(static_cast<size_t>(numel), -1.0f);
    layer.forward(x.data(), forward.data());
    CHECK(forward == wanted_forward);
    layer.backward(z.data(), backward.data());
    CHECK(backward == wanted_backward);
    layer.scores(x.data(), z.data(), [&](int64_t row, const uint16_t *columns, const float *values, int64_t count) {
      for (int64_t i = 0; i < count; ++i) scores[static_cast<size_t>(row * g.depth() + columns[i])] = values[i];
    });
    int64_t kept = 0;
    for (int64_t i = 0; i < numel; ++i) {
      const size_t at = static_cast<size_t>(i);
      CHECK(scores[at] == (bit(mask, i) ? weight.values[at] * q[at] : -1.0f));
      kept += bit(mask, i);
    }
    CHECK(layer.kept() == kept);
    CHECK(layer.bytes() >= paikern::CompactLayer::bytes(kept));
    const std::vector<uint8_t> next = random_bits(random, numel, round == 0 ? 9 : 3);
    for (size_t i = 0; i < mask.size(); ++i) mask[i] &= next[i];
    layer.filter(mask.data());
  }
}

// The layers whose weights are read once, by themselves; each limit is passed by one on either side.
void check_few(Random &random, const PathGeometry &g, bool fits) {
  const int64_t numel = g.rows * g.depth();
  const Weight weight = make_weight(random, numel);
  int64_t kept = 0;
  for (int64_t i = 0; i < numel; ++i) kept += weight.mask.empty() || bit(weight.mask, i);
  const double density = weight.mask.empty() ? 1.0 : static_cast<double>(kept) / static_cast<double>(numel);
  const bool thin = paikern::CompactLayer::pays(g, weight.view, density);
  CHECK(paikern::few_shapes(g) == fits);
  CHECK(paikern::few_positions(g, weight.view, density) == (fits && !thin && weight.view.power != 0));
  if (!weight.mask.empty()) compact(random, g, weight);
  if (!fits || weight.view.power == 0) return;
  const auto x = integers(random, g.batch * g.channels * g.pixels());
  const auto z = integers(random, g.batch * g.rows * g.out_pixels());
  std::vector<float> wanted_forward(z.size()), wanted_backward(x.size()), q(static_cast<size_t>(numel));
  for_paths(g, [&](size_t w, size_t column, size_t row) {
    wanted_forward[row] += weight.values[w] * x[column];
    wanted_backward[column] += weight.values[w] * z[row];
    q[w] += x[column] * z[row];
  });
  std::vector<float> forward(z.size(), NAN);
  paikern::few_forward(g, weight.view, x.data(), forward.data());
  CHECK(forward == wanted_forward);
  for (const bool adjoint : {false, true}) {
    for (const bool scores : {false, true}) {
      if (!adjoint && !scores) continue;
      std::vector<float> backward(x.size(), NAN), found(q.size(), NAN);
      std::vector<uint8_t> seen(static_cast<size_t>(g.rows), 0);
      const auto sink = [&](int64_t row, int64_t rows, const float *values) {
        for (int64_t r = 0; r < rows; ++r) ++seen[static_cast<size_t>(row + r)];
        std::memcpy(found.data() + row * g.depth(), values, sizeof(float) * static_cast<size_t>(rows * g.depth()));
      };
      paikern::few_backward(g, weight.view, scores ? x.data() : nullptr, z.data(), adjoint ? backward.data() : nullptr,
                            sink);
      if (adjoint) CHECK(backward == wanted_backward);
      if (!scores) continue;
      for (size_t i = 0; i < q.size(); ++i) CHECK(found[i] == weight.values[i] * q[i]);
      CHECK(std::all_of(seen.begin(), seen.end(), [](uint8_t times) { return times == 1; }));
    }
  }
}

void few(Random &random) {
  const auto flat = [](int64_t batch, int64_t rows, int64_t channels, int64_t height, int64_t width, int64_t stride) {
    const int64_t out[2] = {(height - 1) / stride + 1, (width - 1) / stride + 1};
    return PathGeometry{batch,
                        1,
                        rows,
                        channels,
                        {1, height, width},
                        {1, 3, 3},
                        {1, stride, stride},
                        {0, 1, 1},
                        {1, 1, 1},
                        {1, out[0], out[1]}};
  };
  check_few(random,
            flat(1, 33 + below(random, 70), 15 + below(random, 20), 1 + below(random, 4), 1 + below(random, 4), 1),
            true);
  check_few(random, flat(1, 32, 15, 4, 4, 1), true);
  check_few(random, flat(4, 71, 15, 4, 3, 2), true);
  check_few(random, flat(1, 65, 16, 16, 16, 4), true);
  check_few(random, flat(1, 1100, 15, 1, 2, 1), true);  // several tables of sums
  check_few(random, flat(1, 40, 15, 17, 1, 1), false);  // positions
  check_few(random, flat(2, 40, 15, 3, 3, 1), false);
  check_few(random, flat(1, 31, 15, 2, 2, 1), false);    // rows
  check_few(random, flat(1, 32, 14, 2, 2, 1), false);    // depth
  check_few(random, flat(1, 32, 15, 16, 17, 5), false);  // pixels
  PathGeometry grouped = flat(1, 64, 32, 2, 2, 1);
  grouped.groups = 2;
  check_few(random, grouped, false);
}

PathGeometry linear(int64_t batch, int64_t rows, int64_t columns) {
  return {batch, 1, rows, columns, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, {1, 1, 1}};
}

PathGeometry convolution(Random &random) {
  PathGeometry g{};
  g.batch = 1 + below(random, 3);
  g.groups = 1 + below(random, 3);
  g.rows = g.groups * (1 + below(random, 10));
  g.channels = g.groups * (1 + below(random, 4));
  for (int axis = 0; axis < 3; ++axis) {
    const bool used = axis == 2 || below(random, 2) == 0;
    g.kernel[axis] = used ? 1 + below(random, 3) : 1;
    g.stride[axis] = used ? 1 + below(random, 2) : 1;
    g.padding[axis] = used ? below(random, 2) : 0;
    g.dilation[axis] = used ? 1 + below(random, 2) : 1;
    g.size[axis] = used ? 5 + below(random, 8) : 1;
    g.out[axis] =
        (g.size[axis] + 2 * g.padding[axis] - g.dilation[axis] * (g.kernel[axis] - 1) - 1) / g.stride[axis] + 1;
  }
  return g;
}

}  // namespace

void paths(Random &random, int rounds) {
  for (const int64_t batch : {1, 3, 20}) {
    check_geometry(random, linear(batch, 1, 1));
    check_geometry(random, linear(batch, 33, 17));
    check_geometry(random, linear(batch, 130, 260));
  }
  for (int round = 0; round < rounds; ++round) {
    const PathGeometry g = convolution(random);
    check_geometry(random, g);
    const Weight weight = make_weight(random, g.rows * g.depth());
    if (!weight.mask.empty()) compact(random, g, weight);
    few(random);
  }
}

}  // namespace check

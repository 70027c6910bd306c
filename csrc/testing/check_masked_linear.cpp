// Products with packed weights against double precision, in buffers of exactly the size that is promised.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "bits.h"
#include "check.h"
#include "halves.h"
#include "masked_linear.h"

namespace check {
namespace {

using paikern::PackedView;
using paikern::WeightType;

std::vector<float> normals(Random &random, int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float &value : values) value = normal(random);
  return values;
}

void close(float found, double truth, double magnitude) { CHECK(std::fabs(found - truth) <= 1e-5 * magnitude + 1e-30); }

// A packed weight that owns its parts, and the same weight dense.
struct Weight {
  Weight(Random &random, int64_t high, int64_t wide, int64_t out_of_ten, int64_t step, WeightType kind)
      : rows(high), columns(wide), panel(step), type(kind) {
    bits = random_bits(random, rows * columns, out_of_ten);
    starts.assign(static_cast<size_t>(rows * ((columns + panel - 1) / panel) + 1), -1);
    paikern::list_positions(bits.data(), rows, columns, panel, nullptr, starts.data());
    const auto kept = static_cast<size_t>(starts.back());
    positions.assign(kept, 0);
    paikern::list_positions(bits.data(), rows, columns, panel, positions.data(), starts.data());
    full = normals(random, static_cast<int64_t>(kept));
    if (type == WeightType::kBfloat16) {
      halves.resize(kept);
      for (size_t i = 0; i < kept; ++i) {
        uint32_t word;
        std::memcpy(&word, &full[i], 4);
        halves[i] = static_cast<uint16_t>(word >> 16);
        full[i] = paikern::bfloat16_to_float(halves[i]);
      }
    }
    size_t next = 0;
    dense.assign(static_cast<size_t>(rows * columns), 0.0);
    for (int64_t i = 0; i < rows * columns; ++i) {
      if (!bit(bits, i)) continue;
      CHECK(positions[next] == static_cast<uint16_t>(i % columns));
      where.push_back(i);
      dense[static_cast<size_t>(i)] = full[next++];
    }
    CHECK(next == kept);
  }

  PackedView view() const {
    const void *values = type == WeightType::kFloat32 ? static_cast<const void *>(full.data()) : halves.data();
    return {values, type, nullptr, positions.data(), starts.data(), rows, columns, panel};
  }

  int64_t rows, columns, panel;
  WeightType type;
  std::vector<uint8_t> bits;
  std::vector<uint16_t> positions, halves;
  std::vector<int32_t> starts;
  std::vector<float> full;
  std::vector<double> dense;
  std::vector<int64_t> where;  // of each kept weight in the dense one
};

// y = x V^T + bias of a dense [rows, columns], V^T where `transposed`.
void products(const Weight &w, bool transposed, const std::vector<float> &x, int64_t batch,
              const std::vector<float> &bias, const std::vector<float> &y) {
  const int64_t outputs = transposed ? w.columns : w.rows, inputs = transposed ? w.rows : w.columns;
  for (int64_t n = 0; n < batch; ++n) {
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = bias.empty() ? 0.0 : bias[static_cast<size_t>(o)], magnitude = std::fabs(sum);
      for (int64_t i = 0; i < inputs; ++i) {
        const double v = w.dense[static_cast<size_t>(transposed ? i * w.columns + o : o * w.columns + i)];
        const double term = v * x[static_cast<size_t>(n * inputs + i)];
        sum += term;
        magnitude += std::fabs(term);
      }
      close(y[static_cast<size_t>(n * outputs + o)], sum, magnitude);
    }
  }
}

// Made dense in two blocks of rows and gathered again, through columns and through bits, any size of an element.
template <class T>
void moves(Random &random, const Weight &w) {
  const int64_t cut = below(random, w.rows + 1), size = static_cast<int64_t>(sizeof(T));
  std::vector<T> values(w.positions.size()), back(values.size(), T{77});
  for (T &value : values) value = static_cast<T>(below(random, 100) + 1);
  std::vector<T> dense(static_cast<size_t>(w.rows * w.columns), T{77});
  T *const below_cut = dense.data() + cut * w.columns;
  for (const bool by_bits : {false, true}) {
    const auto view = [&](std::vector<T> &of) {
      return paikern::KeptView{
          of.data(), w.positions.data(), by_bits ? w.bits.data() : nullptr, w.starts.data(), w.rows, w.columns,
          w.panel};
    };
    paikern::scatter_kept(view(values), size, 0, cut, dense.data());
    paikern::scatter_kept(view(values), size, cut, w.rows - cut, below_cut);
    size_t next = 0;
    for (int64_t i = 0; i < w.rows * w.columns; ++i) {
      CHECK(dense[static_cast<size_t>(i)] == (bit(w.bits, i) ? values[next++] : T{0}));
    }
    paikern::gather_kept(view(back), size, 0, cut, dense.data());
    paikern::gather_kept(view(back), size, cut, w.rows - cut, below_cut);
    CHECK(back == values);
  }
}

void one(Random &random, int64_t rows, int64_t columns, int64_t batch) {
  const auto type = pick<WeightType>(random, {WeightType::kFloat32, WeightType::kBfloat16});
  const Weight w(random, rows, columns, pick<int64_t>(random, {0, 1, 5, 10}), pick<int64_t>(random, {1, 16, 4096}),
                 type);
  const auto x = normals(random, batch * columns), g = normals(random, batch * rows);
  const auto bias = normals(random, below(random, 2) ? rows : 0);

  std::vector<float> y(static_cast<size_t>(batch * rows), 77.0f);
  paikern::masked_linear(w.view(), x.data(), batch, bias.empty() ? nullptr : bias.data(), y.data());
  products(w, false, x, batch, bias, y);

  moves<uint8_t>(random, w);
  moves<uint16_t>(random, w);
  moves<uint32_t>(random, w);
  moves<uint64_t>(random, w);

  const size_t kept = w.positions.size();
  const int64_t panels = (rows + w.panel - 1) / w.panel;
  std::vector<uint16_t> positions(kept);
  std::vector<int32_t> starts(static_cast<size_t>(columns * panels + 1)), source(kept);
  paikern::transpose_positions(w.view(), w.panel, positions.data(), starts.data(), source.data());
  PackedView back = w.view();
  back.source = source.data();
  back.positions = positions.data();
  back.starts = starts.data();
  std::swap(back.rows, back.columns);
  std::vector<float> dx(static_cast<size_t>(batch * columns), 77.0f);
  paikern::masked_linear(back, g.data(), batch, nullptr, dx.data());
  products(w, true, g, batch, {}, dx);

  std::vector<float> dv(kept, 77.0f);
  paikern::masked_linear_kept(w.view(), g.data(), x.data(), batch, dv.data());
  for (size_t i = 0; i < kept; ++i) {
    const int64_t r = w.where[i] / columns, c = w.where[i] % columns;
    double sum = 0.0, magnitude = 0.0;
    for (int64_t n = 0; n < batch; ++n) {
      const double term =
          static_cast<double>(g[static_cast<size_t>(n * rows + r)]) * x[static_cast<size_t>(n * columns + c)];
      sum += term;
      magnitude += std::fabs(term);
    }
    close(dv[i], sum, magnitude);
  }
}

}  // namespace

void masked_linear(Random &random, int rounds) {
  for (int i = 0; i < rounds; ++i) one(random, below(random, 150), below(random, 150), below(random, 70));
  // Several threads: rows of one panel shared, a panel each, more panels than threads.
  for (const int64_t batch : {1, 5, 40, 150}) one(random, 400, 700, batch);
}

}  // namespace check

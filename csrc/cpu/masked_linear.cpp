// Products with a packed weight.
//
// One or two rows of x: gathers, bytes = 6 a kept fp32 weight. More: rows of x become panels [columns, width] once, so
// that one index gives whole vectors, and every block of rows of V goes over one panel after the other while that
// panel stays in L2.
//
// Blocks of rows are dealt out as threads come for them: rows may keep any number of weights. A row's sums belong to
// one task, so the bits do not depend on who takes it.
#include "masked_linear.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "isa.h"
#include "path_plan.h"

namespace paikern {
namespace {

constexpr int64_t kMatvecBatch = 2;
constexpr int64_t kBatch = 1024;     // rows of x in panels at a time: 16 MB at 4096 columns
constexpr int64_t kGroup = 1 << 16;  // entries a task of the matrix-vector product

struct Batch {
  int64_t first, count, vectors;  // rows of x, and the vectors of their panel
};

// Panels of the widest kind, the last as narrow as it can be.
std::vector<Batch> cut_batch(int64_t batch, const MaskedKernels &kernels) {
  const int64_t widest = kernels.lanes * kernels.vectors;
  std::vector<Batch> cut;
  for (int64_t n = 0; n < batch; n += widest) {
    const int64_t count = std::min(widest, batch - n);
    cut.push_back({n, count, divide_up(count, kernels.lanes)});
  }
  return cut;
}

// The panels of x [batch, columns], one after the other.
class Panels {
 public:
  Panels(const MaskedKernels &kernels, const std::vector<Batch> &cut, const float *x, int64_t columns)
      : starts_(cut.size()), buffer_(room(kernels, cut, columns)) {
    constexpr int64_t kColumns = 512;
    const int64_t blocks = divide_up(columns, kColumns), count = static_cast<int64_t>(cut.size());
    const bool parallel = total_ > parallel_work();
#pragma omp parallel for schedule(static) if (parallel)
    for (int64_t task = 0; task < count * blocks; ++task) {
      const Batch &some = cut[static_cast<size_t>(task / blocks)];
      const int64_t c = task % blocks * kColumns;
      kernels.pack(x + some.first * columns + c, columns, some.count, std::min(kColumns, columns - c), some.vectors,
                   buffer_.get() + starts_[static_cast<size_t>(task / blocks)] + c * some.vectors * kernels.lanes);
    }
  }

  const float *operator[](int64_t i) const { return buffer_.get() + starts_[static_cast<size_t>(i)]; }

 private:
  int64_t room(const MaskedKernels &kernels, const std::vector<Batch> &cut, int64_t columns) {
    for (size_t i = 0; i < cut.size(); ++i) {
      starts_[i] = total_;
      total_ += columns * cut[i].vectors * kernels.lanes;
    }
    return total_;
  }

  int64_t total_ = 0;
  std::vector<int64_t> starts_;
  FloatBuffer buffer_;
};

// The values in the order of the entries, as float: where they lie if they are that already.
class Values {
 public:
  Values(const MaskedKernels &kernels, const PackedView &v)
      : direct_(v.type == WeightType::kFloat32 && !v.source ? static_cast<const float *>(v.values) : nullptr),
        buffer_(direct_ ? 0 : v.kept()) {
    if (direct_) return;
    constexpr int64_t kSome = 1 << 14;
    const int64_t kept = v.kept();
    const auto *bytes = static_cast<const char *>(v.values);
    const int64_t size = v.type == WeightType::kFloat32 ? 4 : 2;
#pragma omp parallel for schedule(static) if (kept > parallel_work())
    for (int64_t i = 0; i < kept; i += kSome) {
      const void *from = v.source ? v.values : bytes + i * size;
      kernels.collect(from, v.type, v.source ? v.source + i : nullptr, std::min(kSome, kept - i), buffer_.get() + i);
    }
  }

  const float *get() const { return direct_ ? direct_ : buffer_.get(); }

 private:
  const float *direct_;
  FloatBuffer buffer_;
};

int64_t panels_in_group(const PackedView &v) { return std::max<int64_t>(1, kMaskedColumns / v.panel); }

MaskedRows block_of(const PackedView &v, int64_t first, int64_t count, int64_t panel, int64_t span) {
  return {v.positions, v.starts + first * v.panels() + panel, v.panels(), span, count};
}

// Cuts the rows into ranges of about kGroup entries, each a multiple of kMaskedBlock rows.
std::vector<int64_t> balanced_rows(const PackedView &v) {
  std::vector<int64_t> cuts{0};
  for (int64_t r = 0; r < v.rows;) {
    const int64_t from = v.starts[r * v.panels()];
    do {
      r = std::min(v.rows, r + kMaskedBlock);
    } while (r < v.rows && v.starts[r * v.panels()] - from < kGroup);
    cuts.push_back(r);
  }
  return cuts;
}

void matvec(const MaskedKernels &kernels, const PackedView &v, const float *x, int64_t batch, const float *bias,
            float *y) {
  PackedView entries = v;
  std::optional<Values> values;
  if (v.source) {
    values.emplace(kernels, v);
    entries.values = values->get();
    entries.type = WeightType::kFloat32;
  }
  const std::vector<int64_t> cuts = balanced_rows(v);
  const int64_t tasks = static_cast<int64_t>(cuts.size()) - 1, group = panels_in_group(v);
  // From 2**17 kept weights on: 170,000 of them take one thread 61 us, where a dense product takes 1.2 ms.
#pragma omp parallel for schedule(dynamic) if (8 * v.kept() > parallel_work())
  for (int64_t t = 0; t < tasks; ++t) {
    const int64_t first = cuts[static_cast<size_t>(t)], count = cuts[static_cast<size_t>(t) + 1] - first;
    for (int64_t p = 0; p < v.panels(); p += group) {
      const int64_t span = std::min(group, v.panels() - p);
      kernels.matvec(block_of(v, first, count, p, span), entries.values, entries.type, x + p * v.panel, v.columns,
                     batch, bias ? bias + first : nullptr, p > 0, y + first, v.rows);
    }
  }
}

// Rows at once. With several panels of columns the rows take turns with each of them, so that a panel of x is read from
// beyond L2 once for all of these rows.
int64_t block_rows(const PackedView &v) { return v.panels() > 1 ? 8 * kMaskedBlock : kMaskedBlock; }

// Which panels of columns go together: whole multiples of 65,536, for which the positions stand.
template <class Visit>
void each_panel(const PackedView &v, Visit visit) {
  for (int64_t p = 0; p < v.panels(); ++p) {
    const int64_t base = p * v.panel / kMaskedColumns * kMaskedColumns;
    visit(p, base);
  }
}

void panel_products(const MaskedKernels &kernels, const PackedView &v, const float *values, const float *x,
                    int64_t batch, const float *bias, float *y) {
  const std::vector<Batch> cut = cut_batch(batch, kernels);
  const Panels panels(kernels, cut, x, v.columns);
  const int64_t high = block_rows(v), blocks = divide_up(v.rows, high);
  const int64_t tasks = blocks * static_cast<int64_t>(cut.size());
  const bool parallel = v.kept() * divide_up(batch, kernels.lanes) > parallel_work() / 4;
#pragma omp parallel if (parallel)
  {
    const FloatBuffer tile(high * kernels.lanes * kernels.vectors);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const Batch &some = cut[static_cast<size_t>(task / blocks)];
      const int64_t first = task % blocks * high, count = std::min(high, v.rows - first);
      each_panel(v, [&](int64_t p, int64_t base) {
        kernels.products(block_of(v, first, count, p, 1), values,
                         panels[task / blocks] + base * some.vectors * kernels.lanes, some.vectors, p > 0, tile.get());
      });
      kernels.unpack(tile.get(), some.vectors, some.count, count, bias ? bias + first : nullptr,
                     y + some.first * v.rows + first, v.rows);
    }
  }
}

}  // namespace

const MaskedKernels &masked_kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return masked_kernels_avx512();
  if (isa() == Isa::kAvx2) return masked_kernels_avx2();
#endif
  return masked_kernels_portable();
}

void masked_linear(const PackedView &v, const float *x, int64_t batch, const float *bias, float *y) {
  if (batch == 0 || v.rows == 0) return;
  if (v.columns == 0) {
    for (int64_t n = 0; n < batch; ++n) {
      for (int64_t r = 0; r < v.rows; ++r) y[n * v.rows + r] = bias ? bias[r] : 0.0f;
    }
    return;
  }
  const MaskedKernels &kernels = masked_kernels();
  if (batch <= kMatvecBatch) return matvec(kernels, v, x, batch, bias, y);
  const Values values(kernels, v);
  for (int64_t n = 0; n < batch; n += kBatch) {
    panel_products(kernels, v, values.get(), x + n * v.columns, std::min(kBatch, batch - n), bias, y + n * v.rows);
  }
}

void masked_linear_kept(const PackedView &v, const float *g, const float *x, int64_t batch, float *out) {
  const int64_t kept = v.rows && v.columns ? v.kept() : 0;
  if (kept == 0) return;
  if (batch == 0) {
    std::fill(out, out + kept, 0.0f);
    return;
  }
  const MaskedKernels &kernels = masked_kernels();
  const int64_t high = block_rows(v), blocks = divide_up(v.rows, high);
  for (int64_t n = 0; n < batch; n += kBatch) {
    const std::vector<Batch> cut = cut_batch(std::min(kBatch, batch - n), kernels);
    const Panels xs(kernels, cut, x + n * v.columns, v.columns), gs(kernels, cut, g + n * v.rows, v.rows);
    for (size_t i = 0; i < cut.size(); ++i) {
      const int64_t at = static_cast<int64_t>(i), width = cut[i].vectors * kernels.lanes;
#pragma omp parallel for schedule(dynamic) if (kept * cut[i].vectors > parallel_work() / 4)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = b * high, count = std::min(high, v.rows - first);
        each_panel(v, [&](int64_t p, int64_t base) {
          kernels.dots(block_of(v, first, count, p, 1), gs[at] + first * width, xs[at] + base * width, cut[i].vectors,
                       n > 0 || i > 0, out);
        });
      }
    }
  }
}

}  // namespace paikern

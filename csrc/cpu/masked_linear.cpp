// Products with a packed weight.
//
// One or two rows of x: gathers, bytes = 6 a kept fp32 weight. More: rows of x become panels [columns, width] once, so
// that one index gives whole vectors, and every block of rows of V goes over one panel after the other while that
// panel stays in L2.
//
// Blocks of rows are dealt out as threads come for them: rows may keep any number of weights. A row's sums belong to
// one task, so the bits do not depend on who takes it.
#include "masked_linear.h"

#include <omp.h>

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
// Threads that make a panel each for themselves: a line that another core has just written is slow to come by.
constexpr int64_t kMates = 2;

struct Batch {
  int64_t first, count, vectors;  // rows of x, and the vectors of their panel
};

// Panels as wide as can be, all alike up to one vector; `several` is a number of them that threads like to share.
std::vector<Batch> cut_batch(int64_t batch, const MaskedKernels &kernels, int64_t several) {
  const int64_t vectors = divide_up(batch, kernels.lanes);
  const int64_t count = std::min(vectors, round_up(divide_up(vectors, kernels.vectors), several));
  std::vector<Batch> cut;
  for (int64_t i = 0, at = 0; i < count; ++i) {
    const int64_t wide = vectors / count + (i < vectors % count);
    cut.push_back({at * kernels.lanes, std::min(wide * kernels.lanes, batch - at * kernels.lanes), wide});
    at += wide;
  }
  return cut;
}

constexpr int64_t kColumns = 512;  // packed at a time

void pack(const MaskedKernels &kernels, const Batch &some, const float *x, int64_t columns, float *panel) {
  for (int64_t c = 0; c < columns; c += kColumns) {
    kernels.pack(x + some.first * columns + c, columns, some.count, std::min(kColumns, columns - c), some.vectors,
                 panel + c * some.vectors * kernels.lanes);
  }
}

// The panels of x [batch, columns], one after the other, packed by all threads.
class Panels {
 public:
  Panels(const MaskedKernels &kernels, const std::vector<Batch> &cut, const float *x, int64_t columns)
      : starts_(cut.size()), buffer_(room(kernels, cut, columns)) {
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

// From so many entries on, the values of a transposed weight are collected block by block: a row of V^T takes each from
// another row of V, hence from another page, and the processor keeps the addresses of some 2,000 pages. 4096 x 4096,
// with the product for one row: 14 to 5.1 ms for 5.0 million entries, 6.9 to 3.0 for 3.4; 8192 x 8192: 107 to 46
// for 20.
constexpr int64_t kFarApart = 1'700'000;

// out[i] = values[source[i]]: some rows of V^T take what lies in some rows of V, before they go on to the next of
// those.
void collect_blocks(const MaskedKernels &kernels, const PackedView &v, float *out) {
  constexpr int64_t kWide = 256, kHigh = 1024;
#pragma omp parallel for schedule(dynamic)
  for (int64_t first = 0; first < v.rows; first += kWide) {
    const int64_t last = std::min(v.rows, first + kWide);
    std::vector<int32_t> next(static_cast<size_t>(last - first));
    for (int64_t p = 0; p < v.panels(); ++p) {
      const int64_t base = p * v.panel % kMaskedColumns, count = std::min(v.panel, v.columns - p * v.panel);
      for (int64_t r = first; r < last; ++r) next[static_cast<size_t>(r - first)] = v.starts[r * v.panels() + p];
      for (int64_t c = 0; c < count; c += kHigh) {
        const int64_t limit = base + c + kHigh;
        for (int64_t r = first; r < last; ++r) {
          int32_t &from = next[static_cast<size_t>(r - first)];
          const uint16_t *end = v.positions + v.starts[r * v.panels() + p + 1];
          if (c + kHigh < count) end = std::lower_bound(v.positions + from, end, limit);
          const int32_t to = static_cast<int32_t>(end - v.positions);
          kernels.collect(v.values, v.type, v.source + from, to - from, out + from);
          from = to;
        }
      }
    }
  }
}

// The values in the order of the entries, as float: where they lie if they are that already.
class Values {
 public:
  Values(const MaskedKernels &kernels, const PackedView &v)
      : direct_(v.type == WeightType::kFloat32 && !v.source ? static_cast<const float *>(v.values) : nullptr),
        buffer_(direct_ ? 0 : v.kept()) {
    if (direct_) return;
    constexpr int64_t kSome = 1 << 14;
    const int64_t kept = v.kept();
    if (v.source && kept > kFarApart) {
      collect_blocks(kernels, v, buffer_.get());
      return;
    }
    const auto *bytes = static_cast<const char *>(v.values);
    const int64_t size = v.type == WeightType::kFloat32 ? 4 : 2;
#pragma omp parallel for schedule(static) if (kept > parallel_work() / 8)
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

// Rows first .. last of a product with one panel of x.
void rows_of_panel(const MaskedKernels &kernels, const PackedView &v, const float *values, const float *panel,
                   const Batch &some, int64_t first, int64_t last, const float *bias, float *tile, float *y) {
  for (int64_t high = block_rows(v), r = first; r < last; r += high) {
    const int64_t count = std::min(high, last - r);
    each_panel(v, [&](int64_t p, int64_t base) {
      kernels.products(block_of(v, r, count, p, 1), values, panel + base * some.vectors * kernels.lanes, some.vectors,
                       p > 0, tile);
    });
    kernels.unpack(tile, some.vectors, some.count, count, bias ? bias + r : nullptr, y + some.first * v.rows + r,
                   v.rows);
  }
}

// The sums of rows first .. last over one panel of x.
void dots_of_rows(const MaskedKernels &kernels, const PackedView &v, const float *g, const float *panel,
                  const Batch &some, int64_t first, int64_t last, float *block, bool accumulate, float *out) {
  for (int64_t r = first; r < last; r += kMaskedBlock) {
    const int64_t count = std::min(kMaskedBlock, last - r);
    kernels.pack(g + some.first * v.rows + r, v.rows, some.count, count, some.vectors, block);
    each_panel(v, [&](int64_t p, int64_t base) {
      kernels.dots(block_of(v, r, count, p, 1), block, panel + base * some.vectors * kernels.lanes, some.vectors,
                   accumulate, out);
    });
  }
}

// Where the i-th of `parts` ranges of rows starts that keep about as many weights each.
int64_t share_of(const PackedView &v, int64_t parts, int64_t i) {
  if (i == 0 || i == parts) return i ? v.rows : 0;
  const int64_t wanted = v.kept() * i / parts, panels = v.panels();
  int64_t low = 0, high = v.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (v.starts[middle * panels] < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return std::min(v.rows, round_up(low, kMaskedBlock));
}

void panel_products(const MaskedKernels &kernels, const PackedView &v, const float *values, const float *x,
                    int64_t batch, const float *bias, float *y) {
  const bool parallel = v.kept() * divide_up(batch, kernels.lanes) > parallel_work() / 8;
  const int64_t threads = parallel ? omp_get_max_threads() : 1;
  const std::vector<Batch> cut = cut_batch(batch, kernels, threads);
  const int64_t panels = static_cast<int64_t>(cut.size()), width = cut[0].vectors * kernels.lanes;
  const int64_t mates = divide_up(threads, panels);  // that work on the same panel
  if (mates <= kMates) {
#pragma omp parallel num_threads(threads) if (parallel)
    {
      const FloatBuffer tile(block_rows(v) * width), panel(v.columns * width);
      int64_t packed = -1;
#pragma omp for schedule(static)
      for (int64_t task = 0; task < panels * mates; ++task) {
        const Batch &some = cut[static_cast<size_t>(task / mates)];
        if (packed != task / mates) pack(kernels, some, x, v.columns, panel.get());
        packed = task / mates;
        rows_of_panel(kernels, v, values, panel.get(), some, share_of(v, mates, task % mates),
                      share_of(v, mates, task % mates + 1), bias, tile.get(), y);
      }
    }
    return;
  }
  const Panels shared(kernels, cut, x, v.columns);
  const int64_t high = block_rows(v), blocks = divide_up(v.rows, high);
#pragma omp parallel num_threads(threads) if (parallel)
  {
    const FloatBuffer tile(high * width);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < blocks * panels; ++task) {
      const int64_t i = task / blocks, first = task % blocks * high;
      rows_of_panel(kernels, v, values, shared[i], cut[static_cast<size_t>(i)], first, std::min(v.rows, first + high),
                    bias, tile.get(), y);
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
  const bool parallel = kept * divide_up(batch, kernels.lanes) > parallel_work() / 8;
  const int64_t threads = parallel ? omp_get_max_threads() : 1;
  const int64_t parts = threads <= kMates ? threads : 4 * threads;
  for (int64_t n = 0; n < batch; n += kBatch) {
    const std::vector<Batch> cut = cut_batch(std::min(kBatch, batch - n), kernels, 1);
    const float *gs = g + n * v.rows, *xs = x + n * v.columns;
    std::optional<Panels> shared;
    if (threads > kMates) shared.emplace(kernels, cut, xs, v.columns);
#pragma omp parallel num_threads(threads) if (parallel)
    {
      const int64_t widest = cut[0].vectors * kernels.lanes;
      const FloatBuffer own(shared ? 0 : v.columns * widest), block(kMaskedBlock * widest);
      for (size_t i = 0; i < cut.size(); ++i) {
        const Batch &some = cut[i];
        const float *panel = shared ? (*shared)[static_cast<int64_t>(i)] : own.get();
        if (!shared) pack(kernels, some, xs, v.columns, own.get());
        // Static, and so no barrier between the panels: a thread adds to the sums that were its own before.
#pragma omp for schedule(static) nowait
        for (int64_t part = 0; part < parts; ++part) {
          dots_of_rows(kernels, v, gs, panel, some, share_of(v, parts, part), share_of(v, parts, part + 1), block.get(),
                       n > 0 || i > 0, out);
        }
      }
    }
  }
}

}  // namespace paikern

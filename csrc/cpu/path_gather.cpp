// The sparse plan: the kept weights of a row of the product as (plane offset, value) lists, sums in registers.
//
// Forward, a row of V is a row of the product and its list is cut straight from the bits. The adjoint needs V by
// columns: the lists of a block of columns are cut row by row and sorted by column with one counting pass. A block
// holds about 32 Ki entries, so no list of a whole weight ever exists.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "path_product.h"

namespace paikern {
namespace {

constexpr int64_t kBlockEntries = 1 << 15, kWidth = 2048;

// Parallel lists that grow; writers of whole vectors find room behind `count`.
struct KeptList {
  Scratch<int32_t> keys{1024};
  Scratch<float> values{1024};

  // Room for `count` entries, the first `used` kept.
  void reserve(int64_t count, int64_t used) {
    grow(keys, count + 16, used);
    grow(values, count + 16, used);
  }

 private:
  template <class T>
  static void grow(Scratch<T> &list, int64_t count, int64_t used) {
    if (list.size() >= count) return;
    Scratch<T> larger(2 * count);
    std::memcpy(larger.get(), list.get(), sizeof(T) * static_cast<size_t>(used));
    list = std::move(larger);
  }
};

class RowLists {
 public:
  explicit RowLists(const std::vector<Product> &products) : p_(products.front()) {
    list_.reserve(p_.depth(), 0);
    offsets_.reserve(static_cast<size_t>(p_.depth()) + 16);
    for (int64_t c = 0; c < p_.geometry.group_channels(); ++c) {
      for (const Tap &tap : p_.taps) offsets_.push_back(static_cast<int32_t>(p_.offset(c, tap)));
    }
    offsets_.resize(offsets_.size() + 16);
  }

  void build(int64_t, int64_t, int64_t) {}

  int64_t select(int64_t group, int64_t row, int64_t, int64_t) {
    const int64_t start = (group * p_.rows + row) * p_.depth();
    return path_kernels().list_kept(p_.weights, start, p_.depth(), offsets_.data(), list_.keys.get(),
                                    list_.values.get());
  }
  const int32_t *offsets() const { return list_.keys.get(); }
  const float *values() const { return list_.values.get(); }

 private:
  const Product &p_;
  KeptList list_;
  std::vector<int32_t> offsets_;  // of each column of V
};

class ColumnLists {
 public:
  explicit ColumnLists(const std::vector<Product> &products) : products_(products), p_(products.front()) {}

  // Columns c0 .. c1, a list for each phase of each column, in ascending (row of V, tap).
  void build(int64_t group, int64_t c0, int64_t c1) {
    const int64_t taps = p_.geometry.taps(), depth = p_.geometry.depth(), rows = p_.geometry.group_rows();
    const int64_t width = (c1 - c0) * taps;
    start_tables(c1 - c0);
    int64_t found = 0;
    row_end_.clear();
    for (int64_t o = 0; o < rows; ++o) {
      flat_.reserve(found + width, found);
      found += path_kernels().list_kept(p_.weights, (group * rows + o) * depth + c0 * taps, width, index_.data(),
                                        flat_.keys.get() + found, flat_.values.get() + found);
      row_end_.push_back(found);
    }
    sorted_.reserve(found, 0);
    for (int64_t i = 0; i < found; ++i) ++begin_[bucket(i) + 2];
    for (size_t c = 2; c < begin_.size(); ++c) begin_[c] += begin_[c - 1];
    for (int64_t o = 0, i = 0; o < rows; ++o) {
      const int32_t row = static_cast<int32_t>(o * p_.plane_stride);
      for (; i < row_end_[static_cast<size_t>(o)]; ++i) {
        const int64_t at = begin_[bucket(i) + 1]++;
        sorted_.keys.get()[at] = row + shift_[static_cast<size_t>(flat_.keys.get()[i])];
        sorted_.values.get()[at] = flat_.values.get()[i];
      }
    }
  }

  int64_t select(int64_t, int64_t row, int64_t first, int64_t phase) {
    const size_t c = static_cast<size_t>(phases() * (row - first) + phase);
    at_ = begin_[c];
    return begin_[c + 1] - at_;
  }
  const int32_t *offsets() const { return sorted_.keys.get() + at_; }
  const float *values() const { return sorted_.values.get() + at_; }

 private:
  int64_t phases() const { return static_cast<int64_t>(products_.size()); }

  // Position in the block -> list and shift. Taps that no phase reads go to a list of their own behind the others.
  void start_tables(int64_t columns) {
    const int64_t taps = p_.geometry.taps(), width = columns * taps, lists = columns * phases();
    begin_.assign(static_cast<size_t>(lists) + 3, 0);
    if (static_cast<int64_t>(bucket_.size()) == width) return;
    index_.assign(static_cast<size_t>(width) + 16, 0);
    bucket_.assign(static_cast<size_t>(width), static_cast<int32_t>(lists));
    shift_.assign(static_cast<size_t>(width), 0);
    for (int64_t j = 0; j < width; ++j) index_[static_cast<size_t>(j)] = static_cast<int32_t>(j);
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t phase = 0; phase < phases(); ++phase) {
        for (const Tap &tap : products_[static_cast<size_t>(phase)].taps) {
          bucket_[static_cast<size_t>(c * taps + tap.index)] = static_cast<int32_t>(c * phases() + phase);
          shift_[static_cast<size_t>(c * taps + tap.index)] = static_cast<int32_t>(tap.shift);
        }
      }
    }
  }

  size_t bucket(int64_t i) const { return static_cast<size_t>(bucket_[static_cast<size_t>(flat_.keys.get()[i])]); }

  const std::vector<Product> &products_;
  const Product &p_;
  KeptList flat_, sorted_;
  std::vector<int32_t> index_, bucket_, shift_;
  std::vector<int64_t> begin_, row_end_;
  int64_t at_ = 0;
};

template <class Lists>
void gather_rows(const std::vector<Product> &products, double density) {
  const Product &p = products.front();
  const PathKernels &kernels = path_kernels();
  const int64_t width = round_up(p.lattice.positions, kernels.lanes);
  const double kept =
      density * static_cast<double>(p.adjoint ? p.geometry.group_rows() * p.geometry.taps() : p.depth());
  const double work = kept * static_cast<double>(p.geometry.groups * p.rows * width);
  const bool parallel = work > static_cast<double>(parallel_work() * kernels.lanes) ||
                        p.geometry.groups * p.rows * p.depth() > parallel_work();
  const int64_t threads = parallel ? omp_get_max_threads() : 1;
  int64_t block = std::clamp<int64_t>(static_cast<int64_t>(kBlockEntries / std::max(kept, 1.0)), 1, p.rows);
  if (threads > 1) block = std::min(block, std::max<int64_t>(1, divide_up(p.rows * p.geometry.groups, 4 * threads)));
  const int64_t blocks = divide_up(p.rows, block), tasks = p.geometry.groups * blocks;
  const int64_t pixels = p.grid.size[0] * p.grid.size[1] * p.grid.size[2];
#pragma omp parallel if (parallel && tasks > 1)
  {
    const FloatBuffer c(kWidth);
    Lists lists(products);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t group = task / blocks, r0 = task % blocks * block, r1 = std::min(p.rows, r0 + block);
      lists.build(group, r0, r1);
      const float *base = p.base + group * p.group_stride;
      for (int64_t r = r0; r < r1; ++r) {
        for (size_t phase = 0; phase < products.size(); ++phase) {
          const Product &part = products[phase];
          const int64_t count = lists.select(group, r, r0, static_cast<int64_t>(phase));
          float *out = p.out + (group * p.rows + r) * pixels;
          for (int64_t q = 0; q < width; q += kWidth) {
            const int64_t w = std::min(kWidth, width - q);
            kernels.gather(lists.offsets(), lists.values(), count, base + q, w, c.get());
            write_positions(p.lattice, part.grid, p.batch, p.channels, q, w, 1, c.get(), kWidth, out);
          }
        }
      }
    }
  }
}

}  // namespace

void run_gather(const std::vector<Product> &products, double density) {
  if (products.front().adjoint) {
    gather_rows<ColumnLists>(products, density);
  } else {
    gather_rows<RowLists>(products, density);
  }
}

}  // namespace paikern

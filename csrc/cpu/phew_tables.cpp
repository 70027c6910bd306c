// The cumulated shares of blocks of kernels: one pass over the weights for the rows, one for the columns. One pass for
// both would have to hold the sums of all blocks of columns, half as many bytes as the weights, and is no faster.
#include <algorithm>

#include "phew.h"
#include "phew_kernels.h"

namespace paikern {
namespace {

constexpr int64_t kRows = 16;     // rows of a task
constexpr int64_t kColumns = 64;  // columns of a task: a few lines of memory side by side in every row
constexpr int64_t kTile = 16;     // columns whose tables are written side by side

float share_of(double upto, double total) { return total > 0.0 ? static_cast<float>(upto / total) : 0.0f; }

template <int kWeighting, class T>
void table_of_row(const WalkWeight &weight, const T *data, int64_t row, double *upto, float *tables) {
  const int64_t blocks = weight.row_blocks(), most = weight.row_block();
  const T *kernel = data + row * weight.cols * weight.taps;
  double total = 0.0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t size = std::min(most, weight.cols - block * most);
    double sum = 0.0;
    for (int64_t j = 0; j < size; ++j, kernel += weight.taps) sum += kernel_share<kWeighting>(kernel, weight.taps);
    upto[block] = total += sum;
  }
  float *table = tables + weight.by_row + row * blocks;
  for (int64_t block = 0; block < blocks; ++block) table[block] = share_of(upto[block], total);
}

template <int kWeighting, class T>
void tables_of_columns(const WalkWeight &weight, const T *data, int64_t group, int64_t first, float *tables) {
  const int64_t blocks = weight.col_blocks(), most = weight.col_block(), rows = weight.group_rows();
  const int64_t count = std::min(kColumns, weight.cols - first);
  std::vector<double> held(static_cast<size_t>(blocks * count));
  double total[kColumns] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    double sum[kColumns] = {};
    for (int64_t row = block * most; row < std::min((block + 1) * most, rows); ++row) {
      const T *kernel = data + ((group * rows + row) * weight.cols + first) * weight.taps;
      for (int64_t j = 0; j < count; ++j) sum[j] += kernel_share<kWeighting>(kernel + j * weight.taps, weight.taps);
    }
    double *upto = held.data() + block * count;
    for (int64_t j = 0; j < count; ++j) upto[j] = total[j] += sum[j];
  }
  for (int64_t tile = 0; tile < count; tile += kTile) {
    const int64_t end = std::min(tile + kTile, count);
    for (int64_t block = 0; block < blocks; ++block) {
      float *table = tables + weight.by_col + (group * weight.cols + first) * blocks + block;
      const double *upto = held.data() + block * count;
      for (int64_t j = tile; j < end; ++j) table[j * blocks] = share_of(upto[j], total[j]);
    }
  }
}

}  // namespace

void phew_tables(const std::vector<WalkWeight> &weights, int weighting, float *tables) {
  struct Task {
    const WalkWeight *weight;
    int64_t group, first;  // group -1: rows
  };
  std::vector<Task> tasks;
  for (const WalkWeight &weight : weights) {
    for (int64_t row = 0; row < weight.rows; row += kRows) tasks.push_back({&weight, -1, row});
    for (int64_t group = 0; group < weight.groups; ++group) {
      for (int64_t col = 0; col < weight.cols; col += kColumns) tasks.push_back({&weight, group, col});
    }
  }
  const auto count = static_cast<int64_t>(tasks.size());
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t t = 0; t < count; ++t) {
    const Task &task = tasks[static_cast<size_t>(t)];
    const WalkWeight &held = *task.weight;
    with_type(held, weighting, [&](auto *data, auto kind) {
      constexpr int kWeighting = decltype(kind)::value;
      if (task.group >= 0) return tables_of_columns<kWeighting>(held, data, task.group, task.first, tables);
      std::vector<double> upto(static_cast<size_t>(held.row_blocks()));
      for (int64_t row = task.first; row < std::min(task.first + kRows, held.rows); ++row) {
        table_of_row<kWeighting>(held, data, row, upto.data(), tables);
      }
    });
  }
}

}  // namespace paikern

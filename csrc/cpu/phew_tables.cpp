// One pass over the weights: the cumulated shares of blocks of kernels, along rows and along columns.
#include <algorithm>

#include "phew.h"
#include "phew_kernels.h"

namespace paikern {
namespace {

// 16 rows of a group: their row tables, and what they add to the columns (sums [cols]).
template <int kWeighting, class T>
void pass_rows(const WalkWeight &weight, const T *data, int64_t first, int64_t last, float *tables, double *sums) {
  const int64_t blocks = weight.row_blocks();
  std::fill_n(sums, weight.cols, 0.0);
  std::vector<double> upto(static_cast<size_t>(blocks));
  for (int64_t row = first; row < last; ++row) {
    const T *kernels = data + row * weight.cols * weight.taps;
    double total = 0.0;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = block * kWalkBlock, size = std::min<int64_t>(kWalkBlock, weight.cols - begin);
      double held[kWalkBlock];
      for (int64_t j = 0; j < size; ++j) {
        held[j] = kernel_share<kWeighting>(kernels + (begin + j) * weight.taps, weight.taps);
        sums[begin + j] += held[j];
      }
      double sum = 0.0;
      for (int64_t j = 0; j < size; ++j) sum += held[j];
      upto[static_cast<size_t>(block)] = total += sum;
    }
    float *table = tables + weight.by_row + row * blocks;
    for (int64_t block = 0; block < blocks; ++block) {
      table[block] = total > 0.0 ? static_cast<float>(upto[static_cast<size_t>(block)] / total) : 0.0f;
    }
  }
}

}  // namespace

void phew_tables(const std::vector<WalkWeight> &weights, int weighting, float *tables) {
  struct Task {
    size_t weight;
    int64_t group, block, sums;
  };
  std::vector<Task> tasks;
  std::vector<int64_t> first_sum;
  int64_t sums_size = 0;
  for (size_t w = 0; w < weights.size(); ++w) {
    const WalkWeight &weight = weights[w];
    first_sum.push_back(sums_size);
    for (int64_t group = 0; group < weight.groups; ++group) {
      for (int64_t block = 0; block < weight.col_blocks(); ++block) {
        tasks.push_back({w, group, block, sums_size});
        sums_size += weight.cols;
      }
    }
  }
  std::vector<double> sums(static_cast<size_t>(sums_size));
  const auto count = static_cast<int64_t>(tasks.size());
#pragma omp parallel for schedule(dynamic, 4)
  for (int64_t t = 0; t < count; ++t) {
    const Task &task = tasks[static_cast<size_t>(t)];
    const WalkWeight &weight = weights[task.weight];
    const int64_t begin = task.group * weight.group_rows();
    const int64_t first = begin + task.block * kWalkBlock;
    const int64_t last = std::min(first + kWalkBlock, begin + weight.group_rows());
    with_type(weight, weighting, [&](auto *data, auto kind) {
      pass_rows<decltype(kind)::value>(weight, data, first, last, tables, sums.data() + task.sums);
    });
  }
  const auto layers = static_cast<int64_t>(weights.size());
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t w = 0; w < layers; ++w) {
    const WalkWeight &weight = weights[static_cast<size_t>(w)];
    const int64_t blocks = weight.col_blocks();
    for (int64_t group = 0; group < weight.groups; ++group) {
      double *held = sums.data() + first_sum[static_cast<size_t>(w)] + group * blocks * weight.cols;
      for (int64_t block = 1; block < blocks; ++block) {
        double *row = held + block * weight.cols;
        for (int64_t col = 0; col < weight.cols; ++col) row[col] += row[col - weight.cols];
      }
      const double *total = held + (blocks - 1) * weight.cols;
      float *table = tables + weight.by_col + group * weight.cols * blocks;
      for (int64_t col = 0; col < weight.cols; ++col) {
        for (int64_t block = 0; block < blocks; ++block) {
          table[col * blocks + block] =
              total[col] > 0.0 ? static_cast<float>(held[block * weight.cols + col] / total[col]) : 0.0f;
        }
      }
    }
  }
}

}  // namespace paikern

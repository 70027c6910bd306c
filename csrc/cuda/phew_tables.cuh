// The shares of blocks of kernels in their row and in their column, cumulated (csrc/cpu/phew.h says what they are for).
//
//   n[row, col] = sum over taps of |w| (w * w with weighting 1; with 2 a kernel weighs 1 / n, or 0 where n is 0)
//   sums   sum of n over the kernels of a block: 16 of a row, 4 of a column; 4 and 1 with taps >= 4; one thread each
//   shares upto[b] = upto[b - 1] + sums[b], entry[b] = float(upto[b] / upto[last]); one thread a row or column
//
// All sums are fp64 and go from the first element to the last, as on the CPU: the entries have the same bits. Between
// the two kernels the sums of a side lie as [blocks, lists], so that neighbouring threads have neighbouring words.
// Bytes moved: two reads of the weights; 24 bytes of sums and 4 written an entry, one for every 16 and one for every 4
// kernels. Limit: fp64 adds where these are slow, else memory; the last rows of `shares` wait for their own sums.
// Not yet measured on a GPU.
//
// Device code without standard headers: nvcc, NVRTC and csrc/testing/cuda_on_cpu.h compile the same text.
#pragma once

#include "scores.cuh"

// The rows, or the columns, of one weight; twelve numbers that paikern/backends/cuda_phew.py fills.
struct PaikernSide {
  long long first, first_list;  // number of its first entry and of its first list among those of all sides
  const void *data;
  long long type;  // 0 fp32, 1 bf16, 2 fp16, 3 fp64
  long long cols, taps;
  long long list_rows;             // rows of a group; of a list of columns
  long long down;                  // 0: a list is a row, 1: a column of a group
  long long lists, blocks, block;  // block: kernels of one
  long long begin;                 // of its entries in the tables
};

template <int kType>
PK_DEVICE double pk_magnitude(const void *data, long long i, long long weighting) {
  double wide;
  if constexpr (kType == 3) {
    wide = static_cast<const double *>(data)[i];
  } else {
    wide = static_cast<double>(pk_value(data, kType, i));
  }
  return weighting == 1 ? __dmul_rn(wide, wide) : fabs(wide);
}

// What the kernel weighs in a draw.
template <int kType>
PK_DEVICE double pk_share(const void *data, long long kernel, long long taps, long long weighting) {
  double n = 0.0;
  for (long long i = kernel * taps; i < (kernel + 1) * taps; ++i) {
    n = __dadd_rn(n, pk_magnitude<kType>(data, i, weighting));
  }
  if (weighting == 2) return n > 0.0 ? __ddiv_rn(1.0, n) : 0.0;
  return n;
}

// The sum over `size` kernels that are `stride` apart.
template <int kType>
PK_DEVICE double pk_shares(const void *data, long long kernel, long long stride, long long size, long long taps,
                           long long weighting) {
  double sum = 0.0;
  for (long long j = 0; j < size; ++j) {
    sum = __dadd_rn(sum, pk_share<kType>(data, kernel + j * stride, taps, weighting));
  }
  return sum;
}

// The last side that begins at or before; `kLists`: counted in lists, not in entries.
template <bool kLists>
PK_DEVICE const PaikernSide &pk_side_of(const PaikernSide *sides, long long count, long long at) {
  long long low = 0, high = count - 1;
  while (low < high) {
    const long long middle = (low + high + 1) / 2;
    if ((kLists ? sides[middle].first_list : sides[middle].first) <= at) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return sides[low];
}

extern "C" __global__ void paikern_phew_sums(const PaikernSide *sides, long long count, long long entries,
                                             long long weighting, double *sums) {
  const long long entry = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (entry >= entries) return;
  const PaikernSide &side = pk_side_of<false>(sides, count, entry);
  const long long block = (entry - side.first) / side.lists, list = entry - side.first - block * side.lists;
  const long long length = side.down ? side.list_rows : side.cols, from = block * side.block;
  const long long size = length - from < side.block ? length - from : side.block, stride = side.down ? side.cols : 1;
  const long long row = side.down ? list / side.cols * side.list_rows + from : list;
  const long long kernel = row * side.cols + (side.down ? list % side.cols : from);
  double sum;
  if (side.type == 0) {
    sum = pk_shares<0>(side.data, kernel, stride, size, side.taps, weighting);
  } else if (side.type == 1) {
    sum = pk_shares<1>(side.data, kernel, stride, size, side.taps, weighting);
  } else if (side.type == 2) {
    sum = pk_shares<2>(side.data, kernel, stride, size, side.taps, weighting);
  } else {
    sum = pk_shares<3>(side.data, kernel, stride, size, side.taps, weighting);
  }
  sums[entry] = sum;
}

extern "C" __global__ void paikern_phew_shares(const PaikernSide *sides, long long count, long long lists, double *sums,
                                               float *tables) {
  const long long at = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= lists) return;
  const PaikernSide &side = pk_side_of<true>(sides, count, at);
  const long long list = at - side.first_list;
  double *sum = sums + side.first + list, total = 0.0;
  for (long long block = 0; block < side.blocks; ++block) {
    total = __dadd_rn(total, sum[block * side.lists]);
    sum[block * side.lists] = total;
  }
  float *table = tables + side.begin + list * side.blocks;
  for (long long block = 0; block < side.blocks; ++block) {
    table[block] = total > 0.0 ? static_cast<float>(__ddiv_rn(sum[block * side.lists], total)) : 0.0f;
  }
}

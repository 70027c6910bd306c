// Structured masks: N:M groups, means of rectangular blocks, and a bit a block as a bit an element.
//
//   nm      keep[o, i, s] = |{j in the group of i : score[o, j, s] before score[o, i, s]}| < n,
//           before: larger, or equal at j < i; one thread a score, a ballot is 32 bits of the mask
//   means   [ceil(rows / high), ceil(columns / wide)] float64, eight threads a block: lane j adds the elements whose
//           column in the block is j modulo 8, row after row, and the lanes are added from the first to the last
//   expand  mask[i, j] = blocks[i / high, j / wide], one thread a bit
//
// Scores are dense (fp32, bf16, fp16, fp64) or factored, (|w[o, i]|**p * a[i]) * g[o] in fp32, in this order.
// Bytes moved: one read of the scores and one bit, or 8 bytes a block, written; the m reads of a group are of
// neighbours and come from the caches. Limits: nm compares m scores for each, so that groups of hundreds are bound by
// arithmetic; blocks larger than 8 x 8 leave lanes with long sums, whose order is promised. Not yet measured on a GPU.
#pragma once

#include "scores.cuh"

// Where scores come from; the parameters that all kernels below begin with.
struct PaikernPattern {
  const void *data;
  long long type, absolute;  // 0 fp32, 1 bf16, 2 fp16; fp64 is a matter of the kernel
  const float *a, *g;        // null: dense
  const unsigned char *candidates;
  long long power;
};

PK_DEVICE void pk_read(const PaikernPattern &from, long long at, long long row, long long column, float *value) {
  const float stored = pk_value(from.data, from.type, at);
  if (from.a == nullptr) {
    *value = from.absolute ? fabsf(stored) : stored;
  } else if (from.candidates != nullptr && ((from.candidates[at >> 3] >> (at & 7)) & 1) == 0) {
    *value = -1.0f;  // below every candidate
  } else {
    *value = __fmul_rn(__fmul_rn(pk_power(stored, from.power), from.a[column]), from.g[row]);
  }
}

PK_DEVICE void pk_read(const PaikernPattern &from, long long at, long long, long long, double *value) {
  const double stored = static_cast<const double *>(from.data)[at];
  *value = from.absolute ? fabs(stored) : stored;
}

// The axis has `axis` scores, `inner` apart; down: it is the first dimension of a factored weight.
template <class Value>
PK_DEVICE void pk_nm(const PaikernPattern &from, long long columns, long long down, long long count, long long axis,
                     long long inner, long long n, long long m, unsigned char *bits, long long *nan, long long index) {
  const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  bool kept = false;
  if (i < count) {
    const long long position = i / inner % axis, place = position % m, first = i - place * inner;
    const long long width = axis - (position - place) < m ? axis - (position - place) : m;
    const long long keep = width == m ? n : (width * n + m - 1) / m;
    const long long row = from.a == nullptr ? 0 : first / columns, column = first - row * columns;
    Value mine, other;
    pk_read(from, i, row + (down ? place : 0), column + (down ? 0 : place), &mine);
    if (mine != mine) atomicMin(nan, index);
    long long before = 0;
    for (long long j = 0; j < width && before < keep; ++j) {
      pk_read(from, first + j * inner, row + (down ? j : 0), column + (down ? 0 : j), &other);
      before += other > mine || (other == mine && j < place);
    }
    kept = before < keep;
  }
  const unsigned word = __ballot_sync(0xffffffffu, kept);
  if (i % 8 == 0 && i < count) bits[i / 8] = static_cast<unsigned char>(word >> (i % 32));
}

template <class Value>
PK_DEVICE void pk_means(const PaikernPattern &from, long long rows, long long columns, long long high, long long wide,
                        double *means, long long *nan) {
  const long long t = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x, block = t / 8;
  const long long across = (columns + wide - 1) / wide, down = (rows + high - 1) / high;
  const long long top = block / across * high, left = block % across * wide;
  const long long bottom = top + high < rows ? top + high : rows, right = left + wide < columns ? left + wide : columns;
  double sum = 0.0;
  if (block < down * across) {
    for (long long row = top; row < bottom; ++row) {
      for (long long column = left + t % 8; column < right; column += 8) {
        Value value;
        pk_read(from, row * columns + column, row, column, &value);
        sum = __dadd_rn(sum, static_cast<double>(value));
      }
    }
  }
  double total = __shfl_sync(0xffffffffu, sum, 0, 8);
  for (int lane = 1; lane < 8; ++lane) total = __dadd_rn(total, __shfl_sync(0xffffffffu, sum, lane, 8));
  if (block >= down * across || t % 8 != 0) return;
  const double mean = __ddiv_rn(total, static_cast<double>((bottom - top) * (right - left)));
  means[block] = mean;
  if (mean != mean) atomicMin(nan, 0ll);
}

#define PK_PATTERN_PARAMETERS                                                           \
  const void *data, long long type, long long absolute, const float *a, const float *g, \
      const unsigned char *candidates, long long power
#define PK_PATTERN {data, type, absolute, a, g, candidates, power}

extern "C" __global__ void paikern_nm_mask(PK_PATTERN_PARAMETERS, long long columns, long long down, long long count,
                                           long long axis, long long inner, long long n, long long m,
                                           unsigned char *bits, long long *nan, long long index) {
  pk_nm<float>(PK_PATTERN, columns, down, count, axis, inner, n, m, bits, nan, index);
}

extern "C" __global__ void paikern_nm_mask_64(PK_PATTERN_PARAMETERS, long long columns, long long down, long long count,
                                              long long axis, long long inner, long long n, long long m,
                                              unsigned char *bits, long long *nan, long long index) {
  pk_nm<double>(PK_PATTERN, columns, down, count, axis, inner, n, m, bits, nan, index);
}

extern "C" __global__ void paikern_block_means(PK_PATTERN_PARAMETERS, long long rows, long long columns, long long high,
                                               long long wide, double *means, long long *nan) {
  pk_means<float>(PK_PATTERN, rows, columns, high, wide, means, nan);
}

extern "C" __global__ void paikern_block_means_64(PK_PATTERN_PARAMETERS, long long rows, long long columns,
                                                  long long high, long long wide, double *means, long long *nan) {
  pk_means<double>(PK_PATTERN, rows, columns, high, wide, means, nan);
}

extern "C" __global__ void paikern_expand_blocks(const unsigned char *blocks, long long count, long long columns,
                                                 long long high, long long wide, long long across,
                                                 unsigned char *bits) {
  const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  bool kept = false;
  if (i < count) {
    const long long row = i / columns, at = row / high * across + (i - row * columns) / wide;
    kept = ((blocks[at >> 3] >> (at & 7)) & 1) != 0;
  }
  const unsigned word = __ballot_sync(0xffffffffu, kept);
  if (i % 8 == 0 && i < count) bits[i / 8] = static_cast<unsigned char>(word >> (i % 32));
}

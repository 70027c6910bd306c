// The kernels of Q = G X^T (path_outer.h has the plans). Included by path_kernels.inc.h.
//
//   outer   rows of G times vectors of channels, position by position: 24 accumulators, nothing packed
//   dots    rows of G times planes of X, `kLanes` positions at a time: for few channels and for few kept weights
//
// Every value has an order of summation of its own, whatever tile it is made in: `outer` adds position by position,
// `dots` keeps one partial sum a lane and folds the lanes at the end.
#pragma once

#include "path_rows.inc.h"

namespace {

using paikern::OuterRun;

// Lanes beyond `count` planes repeat the last of them: nobody reads what they give.
void pack_lanes(const float *planes, const int64_t *offsets, int64_t count, int64_t length, int64_t step, float *dst) {
  const float *row[kLanes];
  for (int i = 0; i < kLanes; ++i) row[i] = planes + offsets[i < count ? i : count - 1];
  const int64_t end = (length - 1) * step + 1;
  int64_t next = 0;  // the first position of the vector that is wanted
  for (int64_t k = 0; k < end; k += kLanes) {
    const int left = static_cast<int>(end - k < kLanes ? end - k : kLanes);
    vf block[kLanes];
    for (int i = 0; i < kLanes; ++i) block[i] = left == kLanes ? v_load(row[i] + k) : v_load_part(row[i] + k, left);
    v_transpose(block);
    for (; next < left; next += step, dst += kLanes) v_store(dst, block[next]);
    next -= left;
  }
}

template <int Vectors>
inline void outer_tile(const float *a, int64_t row_step, int64_t step, const float *const *b, const OuterRun *runs,
                       int64_t count, float *c, int64_t ldc, bool accumulate) {
  vf sum[kTileRows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) sum[r][v] = accumulate ? v_load(c + r * ldc + v * kLanes) : v_zero();
  }
  for (int64_t i = 0; i < count; ++i) {
    const float *row = a + runs[i].g * step;
    int64_t at = runs[i].x * kLanes;
    for (int64_t k = 0; k < runs[i].length; ++k, row += step, at += kLanes) {
      vf column[Vectors];
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) column[v] = v_load(b[v] + at);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const vf factor = v_set(row[r * row_step]);
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; ++v) sum[r][v] = v_fma(factor, column[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) v_store(c + r * ldc + v * kLanes, sum[r][v]);
  }
}

void outer(const float *a, int64_t row_step, int64_t step, const float *const *b, int64_t vectors, const OuterRun *runs,
           int64_t count, float *c, int64_t ldc, bool accumulate) {
  if (vectors == 3) {
    outer_tile<3>(a, row_step, step, b, runs, count, c, ldc, accumulate);
  } else if (vectors == 2) {
    outer_tile<2>(a, row_step, step, b, runs, count, c, ldc, accumulate);
  } else {
    outer_tile<1>(a, row_step, step, b, runs, count, c, ldc, accumulate);
  }
}

// The last taps first: whole vectors are written, and what overhangs is overwritten by those of the next channel.
void interleave(const float *src, int64_t taps, int64_t channels, float *dst) {
  for (int64_t t = (taps - 1) / kLanes * kLanes; t >= 0; t -= kLanes) {
    vf block[kLanes];
    for (int i = 0; i < kLanes; ++i) block[i] = t + i < taps ? v_load(src + (t + i) * kLanes) : v_zero();
    v_transpose(block);
    for (int64_t c = 0; c < channels; ++c) v_store(dst + c * taps + t, block[c]);
  }
}

// c[r * ldc + j] = sums of Rows x Columns accumulators; columns from `columns` on repeat the last one and are dropped.
template <int Rows, int Columns>
inline void dots_tile(const float *g, int64_t row_step, const float *x, const int32_t *offsets, int64_t columns,
                      int64_t length, float *c, int64_t ldc) {
  vf sum[Rows * Columns];
#pragma GCC unroll 24
  for (int i = 0; i < Rows * Columns; ++i) sum[i] = v_zero();
  const float *plane[Columns];
#pragma GCC unroll 16
  for (int j = 0; j < Columns; ++j) plane[j] = x + offsets[j < columns ? j : columns - 1];
  for (int64_t k = 0; k < length; k += kLanes) {
    vf row[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) row[r] = v_load(g + r * row_step + k);
#pragma GCC unroll 16
    for (int j = 0; j < Columns; ++j) {
      const vf column = v_load(plane[j] + k);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) sum[r * Columns + j] = v_fma(row[r], column, sum[r * Columns + j]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    float folded[kLanes];
    v_store(folded, v_fold<Columns>(sum + r * Columns));
    for (int64_t j = 0; j < columns; ++j) c[r * ldc + j] = folded[j];
  }
}

constexpr int kDotRows = kLanes == 16 ? 4 : 2;  // times kDotColumns accumulators, as many columns, one row: registers
constexpr int kDotColumns = kLanes == 16 ? 6 : 4, kSingleColumns = kLanes == 16 ? 16 : 4;

constexpr int kDotRest = kLanes == 16 ? 8 : 4;

void dots(const float *g, int64_t row_step, int64_t rows, const float *x, const int32_t *offsets, int64_t count,
          int64_t length, float *c, int64_t ldc) {
  int64_t r = 0;
  for (; r + kDotRows <= rows; r += kDotRows) {
    for (int64_t j = 0; j < count; j += kDotColumns) {
      const int64_t columns = count - j < kDotColumns ? count - j : kDotColumns;
      dots_tile<kDotRows, kDotColumns>(g + r * row_step, row_step, x, offsets + j, columns, length, c + r * ldc + j,
                                       ldc);
    }
  }
  for (; r < rows; ++r) {
    int64_t j = 0;
    for (; j + 8 < count; j += kSingleColumns) {
      const int64_t columns = count - j < kSingleColumns ? count - j : kSingleColumns;
      dots_tile<1, kSingleColumns>(g + r * row_step, row_step, x, offsets + j, columns, length, c + r * ldc + j, ldc);
    }
    for (; j < count; j += kDotRest) {
      const int64_t columns = count - j < kDotRest ? count - j : kDotRest;
      dots_tile<1, kDotRest>(g + r * row_step, row_step, x, offsets + j, columns, length, c + r * ldc + j, ldc);
    }
  }
}

void expand(const WeightView &w, int64_t start, int64_t count, const float *kept, float pruned, float *out) {
  const int64_t bytes = (w.numel + 7) / 8;
  const vf fill = v_set(pruned);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    const uint32_t bits = static_cast<uint32_t>(mask_bits(w.mask, bytes, start + i, lanes));
    const vf value = v_expand(bits, kept, fill);
    kept += __builtin_popcount(bits);
    if (lanes == kLanes) {
      v_store(out + i, value);
    } else {
      float lane[kLanes];
      v_store(lane, value);
      std::memcpy(out + i, lane, sizeof(float) * static_cast<size_t>(lanes));
    }
  }
}

}  // namespace

// The kernels of path_few.cpp, compiled once for each instruction set. Column maps are [depth /
// lanes][positions][lanes].
#pragma once

namespace {

constexpr int64_t kFewRows = 8;
constexpr int kFewTile = kLanes == 16 ? 8 : 4;  // rows whose values and sums fit the registers

// sums[p][r] += v[r] x[p], lane by lane, over `vectors` vectors of columns.
template <int Positions>
inline void few_dots_block(const float *v, int64_t ldv, const float *x, int64_t positions, int64_t vectors,
                           float *sums) {
  for (int64_t r0 = 0; r0 < kFewRows; r0 += kFewTile) {
    vf sum[Positions][kFewTile];
#pragma GCC unroll 2
    for (int p = 0; p < Positions; ++p) {
#pragma GCC unroll 8
      for (int r = 0; r < kFewTile; ++r) sum[p][r] = v_load(sums + (p * kFewRows + r0 + r) * kLanes);
    }
    for (int64_t k = 0; k < vectors; ++k) {
      vf column[Positions];
#pragma GCC unroll 2
      for (int p = 0; p < Positions; ++p) column[p] = v_load(x + (k * positions + p) * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kFewTile; ++r) {
        const vf value = v_load(v + (r0 + r) * ldv + k * kLanes);
#pragma GCC unroll 2
        for (int p = 0; p < Positions; ++p) sum[p][r] = v_fma(value, column[p], sum[p][r]);
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < Positions; ++p) {
#pragma GCC unroll 8
      for (int r = 0; r < kFewTile; ++r) v_store(sums + (p * kFewRows + r0 + r) * kLanes, sum[p][r]);
    }
  }
}

// sums[p][r] += V[r] x[p], lane by lane, for kFewRows rows of `vectors` vectors, ldv floats apart.
void few_dots(const float *v, int64_t ldv, const float *x, int64_t positions, int64_t vectors, float *sums) {
  int64_t p = 0;
  for (; p + 2 <= positions; p += 2) {
    few_dots_block<2>(v, ldv, x + p * kLanes, positions, vectors, sums + p * kFewRows * kLanes);
  }
  if (p < positions) few_dots_block<1>(v, ldv, x + p * kLanes, positions, vectors, sums + p * kFewRows * kLanes);
}

// out[i] = the sum of the lanes of vector i.
void few_fold(const float *sums, int64_t count, float *out) {
  for (int64_t i = 0; i < count; ++i) out[i] = v_sum(v_load(sums + i * kLanes));
}

template <bool Adjoint, bool Score>
inline void few_sweep_rows(const float *v, int64_t ldv, const float *g, const float *x, int64_t positions,
                           int64_t vectors, float *sums, float *q, int64_t ldq) {
  for (int64_t k = 0; k < vectors; ++k) {
    for (int64_t r0 = 0; r0 < kFewRows; r0 += kFewTile) {
      vf value[kFewTile], sum[kFewTile];
#pragma GCC unroll 8
      for (int r = 0; r < kFewTile; ++r) {
        value[r] = v_load(v + (r0 + r) * ldv + k * kLanes);
        sum[r] = v_zero();
      }
      for (int64_t p = 0; p < positions; ++p) {
        const int64_t at = (k * positions + p) * kLanes;
        vf column = v_zero(), total = v_zero();
        if constexpr (Score) column = v_load(x + at);
        if constexpr (Adjoint) total = v_load(sums + at);
#pragma GCC unroll 8
        for (int r = 0; r < kFewTile; ++r) {
          const vf factor = v_set(g[p * kFewRows + r0 + r]);
          if constexpr (Adjoint) total = v_fma(value[r], factor, total);
          if constexpr (Score) sum[r] = v_fma(factor, column, sum[r]);
        }
        if constexpr (Adjoint) v_store(sums + at, total);
      }
      if constexpr (Score) {
#pragma GCC unroll 8
        for (int r = 0; r < kFewTile; ++r) {
          v_store(q + (r0 + r) * ldq + k * kLanes, v_mul(value[r], sum[r]));
        }
      }
    }
  }
}

// sums[k][p] += sum over the rows of v[r][k] g[p][r], rows ascending, and q[r][k] = v[r][k] * sum over p of g[p][r]
// x[k][p], p ascending, for kFewRows rows; sums, or q and x, may be null.
void few_sweep(const float *v, int64_t ldv, const float *g, const float *x, int64_t positions, int64_t vectors,
               float *sums, float *q, int64_t ldq) {
  if (sums && q) {
    few_sweep_rows<true, true>(v, ldv, g, x, positions, vectors, sums, q, ldq);
  } else if (sums) {
    few_sweep_rows<true, false>(v, ldv, g, x, positions, vectors, sums, q, ldq);
  } else {
    few_sweep_rows<false, true>(v, ldv, g, x, positions, vectors, sums, q, ldq);
  }
}

}  // namespace

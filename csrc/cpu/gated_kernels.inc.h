// The bodies behind GatedKernels, compiled once for each instruction set.
//
//   gather  cost follows the kept weights; a shifted load crosses a cache line, so it runs at 1 multiply-add a cycle
//   tile    4 channels share each load: 2 multiply-adds a cycle on AVX-512; faster above a density of about 0.45
//
// Both end with scale, shift, branch, gate and the zeros between the pixels while the sums are in registers.
#pragma once

#include "gated_kernels.h"
#include "path_simd.h"

namespace {

using paikern::GatedBlock;
using paikern::kGatedRows;

#if defined(__AVX512F__)
constexpr int kGatherVectors = 8, kGatedTileVectors = 6;
inline vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vm v_positive(vf a) { return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GT_OQ); }
#elif defined(__AVX2__)
constexpr int kGatherVectors = 8, kGatedTileVectors = 2;
inline vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vm v_positive(vf a) { return _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GT_OQ); }
#else
constexpr int kGatherVectors = 4, kGatedTileVectors = 2;
inline vf v_max(vf a, vf b) { return v_select(a > b, a, b); }
inline vm v_positive(vf a) { return a > v_zero(); }
#endif

inline uint32_t valid_bits(const uint8_t *valid, int64_t position) {
  uint32_t bits = 0;
  std::memcpy(&bits, valid + position / 8, kLanes > 8 ? 2 : 1);
  return kLanes < 8 ? bits >> (position % 8) : bits;
}

// What happens to a finished sum of row r at vector v of the block.
inline vf gated_finish(const GatedBlock &b, int64_t row, int64_t v, vf sum, vf scale, vf shift, vf top) {
  const int64_t at = row * b.stride + v * kLanes;
  vf y = v_fma(sum, scale, shift);
  if (b.add) y = v_fma(v_load(b.add + at), v_set(b.add_scale), y);
  if (b.gate) y = v_keep(v_positive(v_load(b.gate + at)), y);
  if (b.rectify) y = v_keep(v_positive(y), y);
  y = v_keep(v_mask(valid_bits(b.valid, v * kLanes)), y);
  v_store(b.out + at, y);
  return v_max(top, y);
}

inline float v_top(vf a) {
  float lane[kLanes], top = 0.0f;
  v_store(lane, a);
  for (int i = 0; i < kLanes; ++i) top = lane[i] > top ? lane[i] : top;
  return top;
}

template <int Vectors, bool Ones>
inline vf gated_gather_block(const GatedBlock &b, int64_t first, const int32_t *offsets, const float *values,
                             int64_t count, vf scale, vf shift, vf top) {
  vf sum[Vectors];
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) sum[v] = v_zero();
  const float *base = b.base + first * kLanes;
  for (int64_t i = 0; i < count; ++i) {
    const float *src = base + offsets[i];
    if constexpr (Ones) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[v] = v_add(sum[v], v_load(src + v * kLanes));
    } else {
      const vf weight = v_set(values[i]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[v] = v_fma(weight, v_load(src + v * kLanes), sum[v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) top = gated_finish(b, 0, first + v, sum[v], scale, shift, top);
  return top;
}

template <bool Ones>
inline float gated_gather_all(const GatedBlock &b, const int32_t *offsets, const float *values, int64_t count,
                              float scale, float shift) {
  vf top = v_zero();
  const vf s = v_set(scale), t = v_set(shift);
  int64_t n = 0;
  if constexpr (kGatherVectors == 8) {
    for (; n + 8 <= b.vectors; n += 8) top = gated_gather_block<8, Ones>(b, n, offsets, values, count, s, t, top);
  }
  for (; n + 4 <= b.vectors; n += 4) top = gated_gather_block<4, Ones>(b, n, offsets, values, count, s, t, top);
  for (; n + 2 <= b.vectors; n += 2) top = gated_gather_block<2, Ones>(b, n, offsets, values, count, s, t, top);
  for (; n < b.vectors; ++n) top = gated_gather_block<1, Ones>(b, n, offsets, values, count, s, t, top);
  return v_top(top);
}

float gated_gather(const GatedBlock &b, const int32_t *offsets, const float *values, int64_t count, float scale,
                   float shift) {
  return values ? gated_gather_all<false>(b, offsets, values, count, scale, shift)
                : gated_gather_all<true>(b, offsets, values, count, scale, shift);
}

template <int Vectors>
inline vf gated_tile_block(const GatedBlock &b, int64_t first, const int32_t *offsets, const float *values,
                           int64_t count, const float *scale, const float *shift, vf top) {
  vf sum[kGatedRows][Vectors];
#pragma GCC unroll 4
  for (int r = 0; r < kGatedRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[r][v] = v_zero();
  }
  const float *base = b.base + first * kLanes;
  for (int64_t i = 0; i < count; ++i) {
    const float *src = base + offsets[i];
    vf weight[kGatedRows];
#pragma GCC unroll 4
    for (int r = 0; r < kGatedRows; ++r) weight[r] = v_set(values[i * kGatedRows + r]);
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const vf x = v_load(src + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kGatedRows; ++r) sum[r][v] = v_fma(weight[r], x, sum[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kGatedRows; ++r) {
    const vf s = v_set(scale[r]), t = v_set(shift[r]);
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) top = gated_finish(b, r, first + v, sum[r][v], s, t, top);
  }
  return top;
}

float gated_tile(const GatedBlock &b, const int32_t *offsets, const float *values, int64_t count, const float *scale,
                 const float *shift) {
  vf top = v_zero();
  int64_t n = 0;
  for (; n + kGatedTileVectors <= b.vectors; n += kGatedTileVectors) {
    top = gated_tile_block<kGatedTileVectors>(b, n, offsets, values, count, scale, shift, top);
  }
  for (; n + 2 <= b.vectors; n += 2) top = gated_tile_block<2>(b, n, offsets, values, count, scale, shift, top);
  for (; n < b.vectors; ++n) top = gated_tile_block<1>(b, n, offsets, values, count, scale, shift, top);
  return v_top(top);
}

constexpr paikern::GatedKernels make_gated_kernels() {
  return {kLanes, kGatherVectors, kGatedTileVectors, gated_gather, gated_tile};
}

}  // namespace

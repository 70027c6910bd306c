// The bodies behind GatedKernels, compiled once for each instruction set.
//
//   gather  f from kept weights, one load a multiply-add
//   tile    f for 4 channels that share each load, close to 2 multiply-adds a cycle on AVX-512
//   paths   g: sums of kept planes, or of the pruned ones taken from the sum of all where more than half is kept
//
// All end with scale, shift, branch, gate and the zeros between the pixels while the sums are in registers.
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
inline vf gated_finish(const GatedBlock &b, int64_t row, int64_t v, vf y) {
  const int64_t at = row * b.stride + v * kLanes;
  if (b.add) y = v_fma(v_load(b.add + at), v_set(b.add_scale), y);
  if (b.gate) y = v_keep(v_positive(v_load(b.gate + at)), y);
  if (b.rectify) y = v_keep(v_positive(y), y);
  y = v_keep(v_mask(valid_bits(b.valid, v * kLanes)), y);
  v_store(b.out + at, y);
  return y;
}

// Calls visit(Count<Vectors>, first vector) over the vectors of a block, `Most` (8, 6, 4 or 2) at a time while it can.
template <int Vectors>
struct Count {
  static constexpr int value = Vectors;
};

template <int Most, class Visit>
inline void gated_vectors(int64_t vectors, Visit visit) {
  int64_t n = 0;
  for (; n + Most <= vectors; n += Most) visit(Count<Most>{}, n);
  if constexpr (Most > 4) {
    for (; n + 4 <= vectors; n += 4) visit(Count<4>{}, n);
  }
  if constexpr (Most > 2) {
    for (; n + 2 <= vectors; n += 2) visit(Count<2>{}, n);
  }
  for (; n < vectors; ++n) visit(Count<1>{}, n);
}

// sum[v] = the planes at `offsets` added up.
template <int Vectors>
inline void gated_add(const float *base, const int32_t *offsets, int64_t count, vf *sum) {
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) sum[v] = v_zero();
  for (int64_t i = 0; i < count; ++i) {
    const float *src = base + offsets[i];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[v] = v_add(sum[v], v_load(src + v * kLanes));
  }
}

void gated_gather(const GatedBlock &b, const int32_t *offsets, const float *values, int64_t count, const float *scale,
                  const float *shift) {
  const vf s = v_set(*scale), t = v_set(*shift);
  gated_vectors<kGatherVectors>(b.vectors, [&](auto most, int64_t first) {
    constexpr int kVectors = decltype(most)::value;
    const float *base = b.base + first * kLanes;
    vf sum[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[v] = v_zero();
    for (int64_t i = 0; i < count; ++i) {
      const vf weight = v_set(values[i]);
      const float *src = base + offsets[i];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[v] = v_fma(weight, v_load(src + v * kLanes), sum[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) gated_finish(b, 0, first + v, v_fma(sum[v], s, t));
  });
}

void gated_tile(const GatedBlock &b, const int32_t *offsets, const float *values, int64_t count, const float *scale,
                const float *shift) {
  gated_vectors<kGatedTileVectors>(b.vectors, [&](auto most, int64_t first) {
    constexpr int kVectors = decltype(most)::value;
    const float *base = b.base + first * kLanes;
    vf sum[kGatedRows][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kGatedRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = v_zero();
    }
    for (int64_t i = 0; i < count; ++i) {
      const float *src = base + offsets[i];
      vf weight[kGatedRows];
#pragma GCC unroll 4
      for (int r = 0; r < kGatedRows; ++r) weight[r] = v_set(values[i * kGatedRows + r]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const vf x = v_load(src + v * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kGatedRows; ++r) sum[r][v] = v_fma(weight[r], x, sum[r][v]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kGatedRows; ++r) {
      const vf s = v_set(scale[r]), t = v_set(shift[r]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) gated_finish(b, r, first + v, v_fma(sum[r][v], s, t));
    }
  });
}

float gated_paths(const GatedBlock &b, const int32_t *offsets, int64_t count, float scale) {
  vf top = v_zero();
  const vf s = v_set(scale);
  gated_vectors<kGatherVectors>(b.vectors, [&](auto most, int64_t first) {
    constexpr int kVectors = decltype(most)::value;
    vf sum[kVectors];
    gated_add<kVectors>(b.base + first * kLanes, offsets, count, sum);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      // A difference may round to just below 0.
      if (b.all) sum[v] = v_max(v_sub(v_load(b.all + (first + v) * kLanes), sum[v]), v_zero());
      top = v_max(top, gated_finish(b, 0, first + v, v_mul(sum[v], s)));
    }
  });
  float lane[kLanes], found = 0.0f;
  v_store(lane, top);
  for (int i = 0; i < kLanes; ++i) found = lane[i] > found ? lane[i] : found;
  return found;
}

void gated_sum(const GatedBlock &b, const int32_t *offsets, int64_t count, float *out) {
  gated_vectors<kGatherVectors>(b.vectors, [&](auto most, int64_t first) {
    constexpr int kVectors = decltype(most)::value;
    vf sum[kVectors];
    gated_add<kVectors>(b.base + first * kLanes, offsets, count, sum);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) v_store(out + (first + v) * kLanes, sum[v]);
  });
}

constexpr paikern::GatedKernels make_gated_kernels() {
  return {kLanes, kGatherVectors, kGatedTileVectors, gated_gather, gated_tile, gated_paths, gated_sum};
}

}  // namespace

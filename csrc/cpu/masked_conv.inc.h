// The bodies behind ConvKernels, compiled once for each instruction set.
//
//   products  one entry gives up to 8 contiguous vectors of a plane, one fused multiply-add each, sums in registers:
//             8 chains hide the latency, and index and value are loaded once for all of them
//   dots      a vector of g in a register against 8 entries at once; `lanes` sums are folded at a time
#pragma once

#include "masked_conv_kernels.h"
#include "path_simd.h"

namespace {

using paikern::ConvKernels;
using paikern::ConvList;
using paikern::ConvRun;
using paikern::ConvTile;
using paikern::WeightType;

constexpr int kConvVectors = 8;

// --- layouts -------------------------------------------------------------------------------------

template <class T>
inline vf load_pixels(const T *x, int64_t left) {
  if (left >= kLanes) return v_weight(x);
  float lane[kLanes] = {};
  for (int64_t i = 0; i < left; ++i) lane[i] = to_float(x[i]);
  return v_load(lane);
}

template <class T>
void pack_of(const T *x, int64_t ldx, int64_t count, int64_t pixels, const int32_t *table, float *planes) {
  if (count == 1) {
    for (int64_t p = 0; p < pixels; ++p) {
      if (table[p] >= 0) planes[table[p]] = to_float(x[p]);
    }
    return;
  }
  for (int64_t p = 0; p < pixels; p += kLanes) {
    const int64_t left = pixels - p;
    vf block[kLanes];
    for (int i = 0; i < kLanes; ++i) block[i] = i < count ? load_pixels(x + i * ldx + p, left) : v_zero();
    v_transpose(block);
    for (int i = 0; i < kLanes && i < left; ++i) {
      const int32_t at = table[p + i];
      if (at < 0) continue;
      if (count == kLanes) {
        v_store(planes + at, block[i]);
      } else {
        float lane[kLanes];
        v_store(lane, block[i]);
        std::memcpy(planes + at, lane, sizeof(float) * static_cast<size_t>(count));
      }
    }
  }
}

void conv_pack(const void *x, WeightType type, int64_t ldx, int64_t count, int64_t pixels, const int32_t *table,
               float *planes) {
  if (type == WeightType::kFloat32) {
    pack_of(static_cast<const float *>(x), ldx, count, pixels, table, planes);
  } else if (type == WeightType::kBfloat16) {
    pack_of(static_cast<const Bf16 *>(x), ldx, count, pixels, table, planes);
  } else {
    pack_of(static_cast<const Fp16 *>(x), ldx, count, pixels, table, planes);
  }
}

template <class T>
void copy_of(const T *x, const ConvRun *runs, int64_t count, float *planes) {
  for (int64_t r = 0; r < count; ++r) {
    const T *from = x + runs[r].pixel;
    float *to = planes + runs[r].at;
    int64_t i = 0;
    for (; i + kLanes <= runs[r].count; i += kLanes) v_store(to + i, v_weight(from + i));
    if constexpr (sizeof(T) == sizeof(float)) {
      std::memcpy(to + i, from + i, sizeof(float) * static_cast<size_t>(runs[r].count - i));
    } else {
      for (; i < runs[r].count; ++i) to[i] = to_float(from[i]);
    }
  }
}

void conv_copy(const void *x, WeightType type, const ConvRun *runs, int64_t count, float *planes) {
  if (type == WeightType::kFloat32) {
    copy_of(static_cast<const float *>(x), runs, count, planes);
  } else if (type == WeightType::kBfloat16) {
    copy_of(static_cast<const Bf16 *>(x), runs, count, planes);
  } else {
    copy_of(static_cast<const Fp16 *>(x), runs, count, planes);
  }
}

inline void store_pixels(vf values, int64_t left, int64_t step, float *y) {
  if (step == 1 && left >= kLanes) return v_store(y, values);
  float lane[kLanes];
  v_store(lane, values);
  const int64_t count = left < kLanes ? left : kLanes;
  for (int64_t i = 0; i < count; ++i) y[i * step] = lane[i];
}

void conv_unpack(const float *z, int64_t count, int64_t pixels, float *y, int64_t ldy, int64_t step) {
  for (int64_t p = 0; p < pixels; p += kLanes) {
    const int64_t left = pixels - p;
    if (count == 1) {
      store_pixels(v_load(z + p), left, step, y + p * step);
      continue;
    }
    vf block[kLanes];
    for (int i = 0; i < kLanes; ++i) block[i] = v_load(z + (p + (i < left ? i : 0)) * count);
    v_transpose(block);
    for (int i = 0; i < kLanes && i < count; ++i) {
      store_pixels(block[i], left, step, y + i * ldy + p * step);
    }
  }
}

// --- products ------------------------------------------------------------------------------------

template <int V>
inline void product_of(const ConvList &list, float bias, const float *x, float *z) {
  vf sum[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) sum[v] = v_set(bias);
  for (int64_t i = 0; i < list.count; ++i) {
    const float *from = x + list.offsets[i];
    const vf value = v_set(list.values[i]);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[v] = v_fma(value, v_load(from + v * kLanes), sum[v]);
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) v_store(z + v * kLanes, sum[v]);
}

void conv_products(const ConvList &list, float bias, const float *planes, const ConvTile *tiles, int64_t count,
                   float *z) {
  for (int64_t t = 0; t < count; ++t) {
    const float *x = planes + tiles[t].at;
    float *to = z + tiles[t].to;
    switch (tiles[t].vectors) {
      case 1:
        product_of<1>(list, bias, x, to);
        break;
      case 2:
        product_of<2>(list, bias, x, to);
        break;
      case 3:
        product_of<3>(list, bias, x, to);
        break;
      case 4:
        product_of<4>(list, bias, x, to);
        break;
      case 5:
        product_of<5>(list, bias, x, to);
        break;
      case 6:
        product_of<6>(list, bias, x, to);
        break;
      case 7:
        product_of<7>(list, bias, x, to);
        break;
      default:
        product_of<8>(list, bias, x, to);
    }
  }
}

constexpr int kConvDots = kLanes < 8 ? kLanes : 8;  // entries at once

inline void dots_of(const int32_t *offsets, const float *g, const float *planes, const ConvTile *tiles, int64_t count,
                    vf *sums) {
  const float *x[kConvDots];
  vf sum[kConvDots];
#pragma GCC unroll 16
  for (int e = 0; e < kConvDots; ++e) {
    x[e] = planes + offsets[e];
    sum[e] = v_zero();
  }
  for (int64_t t = 0; t < count; ++t) {
    const int64_t at = tiles[t].at;
    const float *row = g + tiles[t].to;
    for (int64_t j = 0; j < tiles[t].vectors * kLanes; j += kLanes) {
      const vf value = v_load(row + j);
#pragma GCC unroll 16
      for (int e = 0; e < kConvDots; ++e) sum[e] = v_fma(value, v_load(x[e] + at + j), sum[e]);
    }
  }
#pragma GCC unroll 16
  for (int e = 0; e < kConvDots; ++e) sums[e] = sum[e];
}

void conv_dots(const ConvList &list, const float *g, const float *planes, const ConvTile *tiles, int64_t count,
               bool accumulate, float *out) {
  for (int64_t i = 0; i < list.count; i += kLanes) {
    const int left = static_cast<int>(list.count - i < kLanes ? list.count - i : kLanes);
    vf sums[kLanes];
    for (int e = 0; e < kLanes; e += kConvDots) {
      int32_t offsets[kConvDots];  // behind the last entry the last again: what it gives is dropped
      for (int k = 0; k < kConvDots; ++k) offsets[k] = list.offsets[i + (e + k < left ? e + k : left - 1)];
      if (e < left) {
        dots_of(offsets, g, planes, tiles, count, sums + e);
      } else {
        for (int k = 0; k < kConvDots; ++k) sums[e + k] = v_zero();
      }
    }
    float lane[kLanes];
    v_store(lane, v_fold<kLanes>(sums));
    for (int k = 0; k < left; ++k) out[i + k] = accumulate ? out[i + k] + lane[k] : lane[k];
  }
}

constexpr ConvKernels make_conv_kernels(const char *name) {
  return {name, kLanes, kConvVectors, conv_pack, conv_copy, conv_unpack, conv_products, conv_dots};
}

}  // namespace

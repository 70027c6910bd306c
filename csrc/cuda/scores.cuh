// The scores of one layer as the keys that rank them, read or made where they are wanted and never stored.
//
//   dense     s[i], or |s[i]|                                    4 or 2 bytes read a score
//   product   |w[i] * g[i]|                                      both factors read
//   factored  (|w[o, i]|**p * a[i]) * g[o]                       the weight read; a and g stay in the caches
//   maps      |w[o, j]|**p * sum over positions of g * x         the weight read; batch * positions products a score
//
// Storage is fp32, bf16 or fp16; arithmetic is fp32 in this order of
// products, without contraction, so that a score has the same bits whenever it is made again. Scores outside the
// candidates count as -infinity. The limit of `maps` is arithmetic: see path kernels for maps that are large.
//
// Device code without standard headers: nvcc, NVRTC and csrc/testing/cuda_on_cpu.h compile the same text.
#pragma once

#include "paikern/key_bits.h"

#define PK_DEVICE static __device__ __forceinline__

// One layer; a row of eight-byte numbers that paikern/backends/cuda_layers.py fills.
struct PaikernLayer {
  long long first;   // position of its first score among those of all layers
  long long count;   // scores
  long long tile;    // number of its first tile
  long long source;  // 0 dense, 1 product, 2 factored, 3 maps
  long long type;    // of data: 0 fp32, 1 bf16, 2 fp16
  const void *data;
  long long other_type;             // of the second factor of a product
  const void *other;                // its second factor; or a: [columns], or x: [batch, channels, *size]
  const float *g;                   // [rows], or [batch, rows, *out]
  const unsigned char *candidates;  // packed, or null
  unsigned char *bits;              // packed mask, written; or null
  long long absolute;
  long long power;            // 1 or 2
  long long columns;          // scores in a row of the weight
  const long long *geometry;  // maps: batch, rows, channels, groups, then size, kernel, stride, padding, dilation, out
  unsigned char *inside;      // packed: scores in the band that a sweep met (select_stream.cuh); null: read them
};

constexpr unsigned kPkMinusInfinity = 0xff800000u;

PK_DEVICE float pk_half(unsigned raw) {  // exact; cuda_fp16.h is not at hand everywhere
  const unsigned sign = (raw & 0x8000u) << 16, magnitude = raw & 0x7fffu;
  const unsigned special = magnitude >= 0x7c00u ? 0x38000000u : 0u;  // infinity and NaN: exponent 31 -> 255
  const unsigned normal = (magnitude << 13) + 0x38000000u + special;
  const unsigned small = __float_as_uint(static_cast<float>(static_cast<int>(magnitude)) * 5.9604644775390625e-8f);
  return __uint_as_float(sign | (magnitude < 0x0400u ? small : normal));
}

PK_DEVICE unsigned pk_raw(const void *data, long long type, long long i) {
  return type == 0 ? static_cast<const unsigned *>(data)[i] : static_cast<const unsigned short *>(data)[i];
}

PK_DEVICE float pk_widened(unsigned raw, long long type) {
  return type == 0 ? __uint_as_float(raw) : type == 1 ? __uint_as_float(raw << 16) : pk_half(raw);
}

PK_DEVICE float pk_value(const void *data, long long type, long long i) {
  return pk_widened(pk_raw(data, type, i), type);
}

PK_DEVICE float pk_power(float w, long long power) { return power == 2 ? __fmul_rn(w, w) : fabsf(w); }

// The sum over the batch and the positions of the row map, in that order, of g times the x under one tap of the kernel.
// Not inlined: registers for it would be taken from the sources that memory limits. Planes have less than 2**31 values.
static __device__ __noinline__ float pk_gradient(const long long *geometry, const float *x, const float *g,
                                                 long long row, int column) {
  const long long *kernel = geometry + 7;
  const int across = static_cast<int>(kernel[1] * kernel[2]), taps = static_cast<int>(kernel[0]) * across;
  const int tap = column % taps;
  const long long channel = row / (geometry[1] / geometry[3]) * (geometry[2] / geometry[3]) + column / taps;
  int from[3] = {tap / across, tap / static_cast<int>(kernel[2]) % static_cast<int>(kernel[1]),
                 tap % static_cast<int>(kernel[2])};
  int size[3], stride[3], out[3];
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    size[d] = static_cast<int>(geometry[4 + d]);
    stride[d] = static_cast<int>(geometry[10 + d]);
    from[d] = from[d] * static_cast<int>(geometry[16 + d]) - static_cast<int>(geometry[13 + d]);
    out[d] = static_cast<int>(geometry[19 + d]);
  }
  const int pixels = size[0] * size[1] * size[2], positions = out[0] * out[1] * out[2];
  const float *plane = x + channel * pixels, *factor = g + row * positions;
  const long long plane_step = geometry[2] * pixels, factor_step = (geometry[1] - 1) * positions;
  float sum = 0.0f;
  for (long long b = geometry[0]; b > 0; --b, plane += plane_step, factor += factor_step) {
    for (int i = 0, at0 = from[0]; i < out[0]; ++i, at0 += stride[0]) {
      for (int j = 0, at1 = from[1]; j < out[1]; ++j, at1 += stride[1], factor += out[2]) {
        if (at0 < 0 || at0 >= size[0] || at1 < 0 || at1 >= size[1]) continue;
        const float *line = plane + (at0 * size[1] + at1) * size[2];
        for (int k = 0, at2 = from[2]; k < out[2]; ++k, at2 += stride[2]) {
          if (at2 >= 0 && at2 < size[2]) sum = __fmaf_rn(factor[k], line[at2], sum);
        }
      }
    }
  }
  return sum;
}

// Bytes of a stored value.
PK_DEVICE long long pk_bytes(long long type) { return type == 0 ? 4 : 2; }

// The score of a weight from what comes in and what goes out; kMaps: these may be maps.
template <bool kMaps>
PK_DEVICE float pk_path_score(const PaikernLayer &layer, float weight, long long row, int column) {
  const float power = pk_power(weight, layer.power);
  const float *a = static_cast<const float *>(layer.other);
  if (!kMaps || layer.source == 2) return __fmul_rn(__fmul_rn(power, a[column]), layer.g[row]);
  return __fmul_rn(power, pk_gradient(layer.geometry, a, layer.g, row, column));
}

// The score at position i of the layer, candidates aside.
PK_DEVICE float pk_score(const PaikernLayer &layer, long long i) {
  const float value = pk_value(layer.data, layer.type, i);
  if (layer.source == 0) return layer.absolute ? fabsf(value) : value;
  if (layer.source == 1) return fabsf(__fmul_rn(value, pk_value(layer.other, layer.other_type, i)));
  const long long row = i / layer.columns;
  return pk_path_score<true>(layer, value, row, static_cast<int>(i - row * layer.columns));
}

PK_DEVICE bool pk_candidate(const PaikernLayer &layer, long long i) {
  return layer.candidates == nullptr || ((layer.candidates[i >> 3] >> (i & 7)) & 1) != 0;
}

// The key of position i of the layer. No key is 0 but that of a NaN.
PK_DEVICE unsigned pk_key(const PaikernLayer &layer, long long i) {
  const bool counts = pk_candidate(layer, i);
  return paikern::ordered_bits(counts ? __float_as_uint(pk_score(layer, i)) : kPkMinusInfinity);
}

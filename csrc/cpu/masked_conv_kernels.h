// The inner kernels of masked_conv2d, one table for each instruction set.
#pragma once

#include <cstdint>

#include "path_kernels.h"

namespace paikern {

// A stretch of flat positions, whole vectors of them: where it starts in a plane and in the row that is made.
struct ConvTile {
  int64_t at, to, vectors;
};

// What a row of V reads: `count` entries, each the offset of a plane (its shift included) and a value.
struct ConvList {
  const int32_t *offsets;
  const float *values;
  int64_t count;
};

// Pixels that stay side by side in a plane.
struct ConvRun {
  int64_t pixel, at, count;
};

struct ConvKernels {
  const char *name;
  int lanes;
  int vectors;  // of the widest tile of `products`

  // planes[table[p] + i] = x[i * ldx + p] for i < count (<= lanes) and p < pixels with table[p] >= 0.
  void (*pack)(const void *x, WeightType type, int64_t ldx, int64_t count, int64_t pixels, const int32_t *table,
               float *planes);

  // planes[at + i] = x[pixel + i] for each run: one image whose pixels stay together.
  void (*copy)(const void *x, WeightType type, const ConvRun *runs, int64_t count, float *planes);

  // y[i * ldy + p * step] = z[p * count + i] for i < count, p < pixels. Reads up to `lanes` floats behind z.
  void (*unpack)(const float *z, int64_t count, int64_t pixels, float *y, int64_t ldy, int64_t step);

  // z[to + j] = bias + sum over the entries of value * planes[offset + at + j] for each tile and j < vectors * lanes.
  void (*products)(const ConvList &list, float bias, const float *planes, const ConvTile *tiles, int64_t count,
                   float *z);

  // out[e] (+)= sum over the tiles and j of g[to + j] * planes[offset + at + j] for each entry e.
  void (*dots)(const ConvList &list, const float *g, const float *planes, const ConvTile *tiles, int64_t count,
               bool accumulate, float *out);
};

const ConvKernels &conv_kernels_portable();
const ConvKernels &conv_kernels_avx2();
const ConvKernels &conv_kernels_avx512();

// The table that fits this CPU and PAIKERN_CPU_ISA.
const ConvKernels &conv_kernels();

}  // namespace paikern

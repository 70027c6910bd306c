// The inner kernels of masked_linear, one table for each instruction set. What runs per kept weight is here; blocks,
// threads and positions are in masked_linear.cpp.
#pragma once

#include <cstdint>

#include "path_kernels.h"

namespace paikern {

// Rows of a packed weight, one stretch of columns of each: row r has the entries starts[r * stride] up to
// starts[r * stride + span], an entry the column (16 bits) and the value of a kept weight.
struct MaskedRows {
  const uint16_t *columns;
  const int32_t *starts;
  int64_t stride, span;
  int64_t count;
};

constexpr int64_t kMaskedBlock = 64;  // rows at once, a multiple of every vector length

struct MaskedKernels {
  const char *name;
  int lanes;
  int vectors;  // of the widest panel

  // panel[c * width + i] = x[i * ldx + c] for i < count, 0 for the rest of width = vectors * lanes.
  void (*pack)(const float *x, int64_t ldx, int64_t count, int64_t columns, int64_t vectors, float *panel);

  // y[i * ldy + r] = tile[r * width + i] + bias[r] (none if null) for i < count, r < rows.
  void (*unpack)(const float *tile, int64_t vectors, int64_t count, int64_t rows, const float *bias, float *y,
                 int64_t ldy);

  // tile[r * width + i] (+)= sum over the entries of row r of value * panel[column * width + i].
  void (*products)(const MaskedRows &rows, const float *values, const float *panel, int64_t vectors, bool accumulate,
                   float *tile);

  // out[e] (+)= sum over i < width of g[r * width + i] * panel[column * width + i] for the entries e of row r.
  void (*dots)(const MaskedRows &rows, const float *g, const float *panel, int64_t vectors, bool accumulate,
               float *out);

  // y[b * ldy + r] (+)= sum over the entries of row r of value * x[b * ldx + column] + bias[r], batch 1 or 2.
  void (*matvec)(const MaskedRows &rows, const void *values, WeightType type, const float *x, int64_t ldx,
                 int64_t batch, const float *bias, bool accumulate, float *y, int64_t ldy);

  // out[i] = values[source[i]] as float for i < count, values[i] where source is null.
  void (*collect)(const void *values, WeightType type, const int32_t *source, int64_t count, float *out);

  // row[c] = the next of values where bit start + c of a mask of `bytes` bytes is set, else 0, for c < columns; nothing
  // is read from `end` on.
  void (*expand)(const uint8_t *bits, int64_t bytes, int64_t start, int64_t columns, const float *values,
                 const float *end, float *row);
};

const MaskedKernels &masked_kernels_portable();
const MaskedKernels &masked_kernels_avx2();
const MaskedKernels &masked_kernels_avx512();

// The table that fits this CPU and PAIKERN_CPU_ISA.
const MaskedKernels &masked_kernels();

}  // namespace paikern

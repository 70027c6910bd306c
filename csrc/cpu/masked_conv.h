// Convolutions with a packed weight V = W * M on the CPU: Y = V * X + b, its adjoint and its gradient at the kept
// positions. V is [rows, channels / groups * kernel], rows and columns as in masked_linear.h.
#pragma once

#include <cstdint>

#include "path_kernels.h"

namespace paikern {

struct ConvShape {
  int64_t batch, groups;
  int64_t rows, channels;  // of Y and of X
  int64_t size[2], kernel[2], stride[2], padding[2], dilation[2];
  int64_t out[2];

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t pixels() const { return size[0] * size[1]; }
  int64_t out_pixels() const { return out[0] * out[1]; }
};

// The entries of V, or of V^T for the adjoint: row r of it has entries starts[r * panels] up to starts[(r + 1) *
// panels], in panels of `panel` columns whose number is stored modulo 65,536.
struct ConvEntries {
  const float *values;
  const int32_t *source;  // entry i has the value values[source[i]], or values[i] where null
  const uint16_t *positions;
  const int32_t *starts;
  int64_t rows, columns, panel;

  int64_t panels() const { return (columns + panel - 1) / panel; }
  int64_t kept() const { return rows && columns ? starts[rows * panels()] : 0; }
};

// A map as the caller has it, [batch, channels, *size] row-major; kFloat32, kBfloat16 or kFloat16.
struct ConvMap {
  const void *data;
  WeightType type;
};

// y [batch, rows, *out] = V x + bias. Every sum runs over the entries of its row in their order: the same bits for any
// number of threads, any place in the map and any place in the batch.
void masked_conv2d(const ConvShape &shape, const ConvEntries &v, ConvMap x, const float *bias, float *y);

// x [batch, channels, *size] = V^T g, with the entries of V^T; sums in the order of (tap, row of V).
void masked_conv2d_input(const ConvShape &shape, const ConvEntries &transposed, ConvMap g, float *x);

// out[i] = sum over batch and pixels of g at the row times x under the column of entry i.
void masked_conv2d_kept(const ConvShape &shape, const ConvEntries &v, ConvMap g, ConvMap x, float *out);

}  // namespace paikern

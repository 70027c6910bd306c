// Path operations on the CPU: products with V = |W|**p * M, their adjoints, scores and the fused DPaI step.
//
// One view for linear and convolution weights: V is [rows, depth] with depth = channels / groups * prod(kernel), and
// every operation is a product of V with the shifted planes of a map. Linear: one pixel, batch = rows of x.
#pragma once

#include <cstdint>

#include "path_kernels.h"

namespace paikern {

struct PathGeometry {
  int64_t batch, groups;
  int64_t rows;      // O: channels of the row map (the output of a convolution)
  int64_t channels;  // C: channels of the column map (its input)
  int64_t size[3];   // spatial size of the column map, leading dimensions 1 when fewer than 3
  int64_t kernel[3], stride[3], padding[3], dilation[3];
  int64_t out[3];  // spatial size of the row map

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t group_rows() const { return rows / groups; }
  int64_t group_channels() const { return channels / groups; }
  int64_t depth() const { return group_channels() * taps(); }
  int64_t pixels() const { return size[0] * size[1] * size[2]; }
  int64_t out_pixels() const { return out[0] * out[1] * out[2]; }
  bool linear() const { return taps() == 1 && groups == 1 && pixels() == 1 && out_pixels() == 1 && padding_free(); }

 private:
  bool padding_free() const { return padding[0] == 0 && padding[1] == 0 && padding[2] == 0; }
};

// z [batch, rows, *out] = V x, x [batch, channels, *size]
void path_forward(const PathGeometry &geometry, const WeightView &w, const float *x, float *z);

// x [batch, channels, *size] = V^T g, g [batch, rows, *out]
void path_backward(const PathGeometry &geometry, const WeightView &w, const float *g, float *x);

// score [rows, depth] = V * (g x^T), `pruned` where the mask bit is 0
void path_score(const PathGeometry &geometry, const WeightView &w, const float *x, const float *g, float pruned,
                float *score);

struct DpaiState {
  float *s, *m, *v;          // m, v null for plain ascent
  const uint8_t *mask;       // the mask that the maps were made with
  const uint8_t *node_live;  // one byte an output unit of the layer
  bool node_is_channel;      // true: nodes are the channels of the column map (transposed roles)
};

// The fused DPaI update; q = g x^T of the two maps of `geometry`.
DpaiCounts dpai_step(const PathGeometry &geometry, const DpaiState &state, const DpaiRule &rule, const float *x,
                     const float *g);

// The same update with q [rows, depth] given.
DpaiCounts dpai_update(const PathGeometry &geometry, const DpaiState &state, const DpaiRule &rule, const float *q);

}  // namespace paikern

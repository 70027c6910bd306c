// The inner kernels of gated.cpp, one table for each instruction set.
#pragma once

#include <cstdint>

namespace paikern {

constexpr int kGatedRows = 4;  // output channels of a dense tile

// A stretch of positions of some output channels: out = valid * gate(acc * scale + shift + add * add_scale).
struct GatedBlock {
  const float *base;     // input planes at the first position; kept weights are offsets from here
  float *out;            // channel 0 of the rows at the first position
  const float *add;      // another map in the layout of `out`, or null
  const float *gate;     // keep where this map is positive, or null
  const float *all;      // g: the sum over all columns, from which pruned weights are taken, or null
  const uint8_t *valid;  // bits of the positions that are pixels, from the first position on
  int64_t stride;        // floats from channel to channel of out, add and gate
  int64_t vectors;
  float add_scale;
  bool rectify;  // keep what is positive itself
};

struct GatedKernels {
  int lanes, gather_vectors, tile_vectors;  // vectors a block at most, 1 for each accumulator

  // f, one channel from its kept weights.
  void (*gather)(const GatedBlock &block, const int32_t *offsets, const float *values, int64_t count,
                 const float *scale, const float *shift);

  // f, kGatedRows channels from weights [count][kGatedRows].
  void (*tile)(const GatedBlock &block, const int32_t *offsets, const float *values, int64_t count, const float *scale,
               const float *shift);

  // g, one channel from its kept weights, or from the pruned ones where `all` is given. Returns the maximum.
  float (*paths)(const GatedBlock &block, const int32_t *offsets, int64_t count, float scale);

  // out = the sum of the planes at `offsets`.
  void (*sum)(const GatedBlock &block, const int32_t *offsets, int64_t count, float *out);
};

const GatedKernels &gated_kernels_portable();
const GatedKernels &gated_kernels_avx2();
const GatedKernels &gated_kernels_avx512();

}  // namespace paikern

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
  const uint8_t *valid;  // bits of the positions that are pixels, from the first position on
  int64_t stride;        // floats from channel to channel of out, add and gate
  int64_t vectors;
  float add_scale;
  bool rectify;  // keep what is positive itself
};

struct GatedKernels {
  int lanes, gather_vectors, tile_vectors;  // vectors a block at most, 1 for each accumulator

  // One channel from its kept weights; null values are ones. Returns the maximum of what was written.
  float (*gather)(const GatedBlock &block, const int32_t *offsets, const float *values, int64_t count, float scale,
                  float shift);

  // kGatedRows channels from weights [count][kGatedRows].
  float (*tile)(const GatedBlock &block, const int32_t *offsets, const float *values, int64_t count,
                const float *scale, const float *shift);
};

const GatedKernels &gated_kernels_portable();
const GatedKernels &gated_kernels_avx2();
const GatedKernels &gated_kernels_avx512();

}  // namespace paikern

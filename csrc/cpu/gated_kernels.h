// The inner kernels of gated.cpp, one table for each instruction set.
#pragma once

#include <cstdint>

namespace paikern {

constexpr int64_t kGatedQuad = 4;  // output channels whose path counts are summed together

// A rectangle of units (see gated_lattice.h) of some output channels. `base`, `out`, `add`, `open` and `gate` point at
// its first unit: out = valid * gate(sum * scale + shift + add * add_scale). The next unit of `out` reads one unit
// on or two, as the table says.
struct GatedBlock {
  const float *base;    // input planes; kept weights are offsets from here
  float *out;           // of the first of the output channels
  const float *add;     // another map in the layout of `out`, or null
  uint8_t *open;        // f: where the bits go that say what is positive, or null; what is not becomes 0
  const uint8_t *gate;  // g: keep what these bits say, or null
  const float *all;     // g: the sums over all columns, from which pruned weights are taken, or null
  const float *from;    // what the sums start from: kGatedZeros, or `sums` after earlier columns
  float *sums;          // [channels of a call, rows, columns] units
  float *shared;        // two more blocks of units, for a quad
  int64_t channel;      // floats from channel to channel of out and add; the bits lie in the same order
  int64_t row;          // floats from row to row of out and add
  int64_t base_row;     // the same of what rows of `out` read
  int columns, rows;    // as the table allows; columns a power of two
  uint32_t valid[2];    // of each row: the floats of its units that are pixels
  float add_scale;
  bool beside;  // the last of the columns of units lies beside the pixels
  bool last;    // of the columns: what follows the sum is done, else the sum is kept in `sums`
};

// One block of zeros: sums start with loads, since a branch would keep them in memory.
alignas(64) constexpr float kGatedZeros[16 * 16] = {};

// The columns of a quad that just the rows in `rows` (bits) list. Those of one row come last, in the order of the rows.
struct GatedClass {
  uint32_t rows;
  int32_t count;
};

// The window of one unit of a max pool.
struct GatedPool {
  const int64_t *rows;     // of each row of taps, in floats
  const uint32_t *inside;  // the floats of a unit whose row is one of the image
  int64_t height, width;   // taps
  int64_t next;            // floats from tap to tap
  uint32_t valid;          // the floats of the unit that are pixels
};

struct GatedKernels {
  int columns, rows;  // units a block at most
  int gate_bytes;     // of the bits of a unit

  // f, one channel from its kept weights.
  void (*values)(const GatedBlock &block, const int32_t *offsets, const float *values, int64_t count, float scale,
                 float shift);

  // f, two channels that share the loads of the columns that both keep: `counts` of both, of the first alone and of the
  // second alone, in this order in `offsets` and `values`; columns of both have two values.
  void (*pair)(const GatedBlock &block, const int32_t *offsets, const float *values, const int32_t *counts,
               const float *scale, const float *shift);

  // g, one channel from its kept weights, or from the pruned ones where `all` is given. Returns the maximum.
  float (*paths)(const GatedBlock &block, const int32_t *offsets, int64_t count, float scale);

  // g, kGatedQuad channels from classes of columns: what several channels add is added up once.
  float (*quad)(const GatedBlock &block, const int32_t *offsets, const GatedClass *classes, int64_t count, float scale);

  // sums += the planes at `offsets`.
  void (*sum)(const GatedBlock &block, const int32_t *offsets, int64_t count);

  // One unit of a map: its values where `by` is largest.
  void (*pool)(const GatedPool &pool, const float *values, const float *by, float *out);

  // to = from where bit (position % 16) of `bits` is set, else 0; `from` may lie anywhere.
  void (*shift)(const float *from, float *to, int64_t units, uint32_t bits);
};

// `step`, 1 or 2: how many units on the next unit of the output reads.
const GatedKernels &gated_kernels_portable(int step);
const GatedKernels &gated_kernels_avx2(int step);
const GatedKernels &gated_kernels_avx512(int step);

}  // namespace paikern

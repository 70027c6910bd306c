// Random walks biased by magnitude: tables, walks in both directions, and keeping what they passed.
//
// A weight is seen as kernels [rows, cols] of `taps` elements as it is stored; rows come in `groups`, cols are those of
// one group. n[row, col] = sum over taps of |w| (w * w with weighting 1; with 2 a kernel weighs 1 / n instead of n). A
// walk enters a weight by a unit of one side and draws the other: along a row or along a column of n.
//
// Tables: along each row and each column of a group, kernels in blocks, the cumulated share of the blocks as float32 in
// (0, 1]. A draw looks its block up and then adds up the kernels of that block from the weights themselves. All sums
// are float64 in one order. A block of a row is 16 kernels in one place; the kernels of a column lie in as many pages
// of memory, which took most of a walk's time with blocks of 16, so that a block is 4 of them. Of kernels with 4
// elements or more there are fewer: a block is 4 along a row and 1 along a column.
//
// Randomness is Philox4x32-10, keyed by the seed, its counter (walk, hop): no draw depends on what ran before it.
#pragma once

#include <cstdint>
#include <vector>

namespace paikern {

constexpr int kLargestBlock = 16;

struct WalkWeight {
  const void *data;
  int type;  // 0 float, 1 bfloat16, 2 float16, 3 double
  int64_t rows, cols, taps, groups;
  bool transposed;         // rows are inputs, not outputs
  int64_t base;            // number of its first bit, -1 where it takes no part in the mask
  int64_t by_row, by_col;  // where its tables begin

  int64_t group_rows() const { return rows / groups; }
  int64_t row_block() const { return taps >= 4 ? 4 : 16; }
  int64_t row_blocks() const { return (cols + row_block() - 1) / row_block(); }
  int64_t col_block() const { return taps >= 4 ? 1 : 4; }
  int64_t col_blocks() const { return (group_rows() + col_block() - 1) / col_block(); }
};

// Fills the tables of all weights; a row or column without magnitude is all zero.
void phew_tables(const std::vector<WalkWeight> &weights, int weighting, float *tables);

// The walk graph, flattened; offsets of lists are into `index`.
struct WalkGraph {
  const int64_t *nodes;  // [nodes, 8]: kind, weight, first unit, units, links begin, end, slots begin, end
  const int64_t *slots;  // [slots, 2]: node, list: the units that meet unit u there are index[list + u] to [.. + u + 1]
  const int64_t *links;  // [links, 2]: slot, list: what unit u (of the node) meets in the slot
  const int32_t *index;
  const int32_t *owner;   // [units]: node of every unit
  const int32_t *starts;  // input units
  int64_t inputs, outputs, output_node;
};

// Walks first .. first + count - 1, even ones forwards, odd ones backwards, one in each row of out [count, width]: the
// bits that it passed in the order of the walk, then -1. The row of a walk that met a unit without successor is empty.
// With `whole`, all taps of a kernel are passed.
void phew_walks(const std::vector<WalkWeight> &weights, const float *tables, const WalkGraph &graph, uint64_t seed,
                int64_t first, int64_t count, int64_t width, int weighting, bool whole, int64_t *out);

// What `phew_keep` goes on from: see there.
struct WalkState {
  int64_t kept, walks, window_new, window_skipped, skipped, status;
};
enum WalkStatus : int64_t { kWalking, kFull, kStalled, kTooLong };

// Sets the bits of walks in their order until `target` are set. With `exact`, a walk whose new bits are more than are
// missing is skipped. Walks that end a thousand in which fewer than `stall` new bits came end it: kTooLong where some
// were skipped, else kStalled.
void phew_keep(uint8_t *bits, WalkState &state, const int64_t *walks, int64_t count, int64_t width, int64_t target,
               int64_t stall, bool exact);

}  // namespace paikern

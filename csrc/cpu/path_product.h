// One product with V or its transpose, and the two plans that run it (path_product.cpp chooses).
#pragma once

#include "path_plan.h"

namespace paikern {

// A product of R rows for each group: C[r, q] = sum_k A[r, k] base[offset[k] + q].
struct Product {
  const PathGeometry &geometry;
  const WeightView &weights;
  const Lattice &lattice;
  const Grid &grid;               // where the positions go
  const std::vector<Tap> &taps;   // those that take part
  const float *base;              // group 0; position 0 of the first plane
  int64_t group_stride;           // floats from one group's planes to the next
  int64_t plane_stride;           // floats a channel of the map being read
  int64_t batch, rows, channels;  // rows a group; channels of the map being written
  bool adjoint;                   // rows are column channels, k = (row of V, tap)
  float *out;

  int64_t tap_count() const { return static_cast<int64_t>(taps.size()); }
  int64_t depth() const { return (adjoint ? geometry.group_rows() : geometry.group_channels()) * tap_count(); }
  int64_t offset(int64_t channel, const Tap &tap) const {
    return channel * plane_stride + tap.phase * lattice.span + tap.shift;
  }
};

// Panels of V against packed columns.
void run_tiles(const Product &product);

// The kept weights of a row as (plane, value) pairs; offsets must fit 32 bits. The products are the phases of one
// adjoint, or a single one; they differ in grid and taps.
void run_gather(const std::vector<Product> &products, double density);

}  // namespace paikern

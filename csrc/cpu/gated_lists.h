// The kept weights of one step of a GatedProgram as shifts of the planes it reads.
#pragma once

#include <cstdint>
#include <vector>

#include "gated.h"
#include "gated_kernels.h"
#include "gated_lattice.h"

namespace paikern {

class GatedLists {
 public:
  GatedLists(const GatedStep &step, const GatedMap &in, const GatedMap &out, const GatedLattice &from,
             const GatedLattice &to);

  void load(const float *theta, const uint8_t *mask, const float *scale, const float *shift);

  // Floats of the phase planes that this step reads; 0 where it reads the map itself.
  int64_t phase_floats() const { return direct_ ? 0 : in_.channels * static_cast<int64_t>(planes_.size()) * to_.span; }
  // Whether the map itself is read.
  bool direct() const { return direct_; }
  int step() const { return direct_ ? static_cast<int>(step_.stride[1]) : 1; }

  // Whether all positions of a plane may be taken as one row.
  bool flat() const { return flat_; }

  void fill_phases(const GatedKernels &kernels, const GatedLattice &from, const float *map, float *planes) const;

  // Units of scratch that the runs below need for a block of one unit.
  int64_t scratch() const { return out_.channels / step_.groups + 3; }

  // All rows of one block of f.
  void run_values(const GatedKernels &kernels, const GatedBlock &block, float *scratch) const;

  // All rows of one block of g, the sums multiplied by `scale`. Returns the maximum.
  float run_paths(const GatedKernels &kernels, const GatedBlock &block, float scale, float *scratch) const;

 private:
  // A plane of its own: in[y * stride + phase_y][x * stride + phase_x].
  struct Plane {
    int64_t phase_y, phase_x;
  };
  // Kept weights of f, of one row or of two together: first what both keep, with two values a column, then what each
  // keeps alone.
  struct Kept {
    int64_t row, rows, offset, value;  // where its columns and values begin
    int32_t counts[3];
  };
  struct Values {
    int64_t parts = 1;
    std::vector<int64_t> begin;  // first of the lists of each part of each group
    std::vector<Kept> lists;
    std::vector<int32_t> offsets;
    std::vector<float> values;
  };
  // One row of g or kGatedQuad rows together; they list their pruned weights where that is shorter.
  struct Item {
    int64_t row, rows;
    bool pruned;
  };
  struct Paths {
    int64_t parts = 1;
    std::vector<Item> items;            // of all groups
    std::vector<int64_t> group;         // first item of each group
    std::vector<int64_t> begin, first;  // of each part of each item: its offsets and its classes
    std::vector<int32_t> offsets;
    std::vector<GatedClass> classes;
  };

  void list_values(const float *theta, const uint8_t *kept);
  void list_kept(const float *theta, const uint8_t *kept, int64_t row, int64_t end, int64_t index);
  void list_paths(const uint8_t *kept);
  void list_item(const Item &item, const uint8_t *kept);
  Item quad(const uint8_t *kept, int64_t row, double *cost);
  void mark(const uint8_t *kept, int64_t row, int64_t rows, int64_t first, int64_t end);
  void sort_part(int64_t first, int64_t end, int64_t *counts);
  int64_t parts_of(int64_t listed) const;

  // The first column of part `index` of `parts`.
  int64_t part(int64_t index, int64_t parts) const { return depth_ * index / parts / taps_ * taps_; }

  GatedStep step_;
  GatedMap in_, out_;
  GatedLattice to_;
  int64_t taps_ = 1, depth_ = 1, group_stride_ = 0;
  int64_t most_parts_ = 1;  // the columns of a weight are taken in parts whose planes stay in the first cache
  bool direct_ = true, flat_ = true, moves_rows_ = false;  // moves_rows_: taps on phase planes
  std::vector<Plane> planes_;
  std::vector<int32_t> offset_of_;  // of each column of the weight
  Values values_;
  Paths paths_;
  std::vector<float> scale_, shift_;
  std::vector<uint8_t> codes_;   // while loading: of each column, which of a few rows list it
  std::vector<int32_t> sorted_;  // columns of one part by their codes
};

}  // namespace paikern

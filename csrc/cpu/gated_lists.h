// The kept weights of one step of a GatedProgram as shifts of the planes it reads, and the lattice of those planes.
#pragma once

#include <cstdint>
#include <vector>

#include "gated.h"
#include "gated_kernels.h"

namespace paikern {

// The pixels of all maps of one size: image n, row y, column x is position (n * rows + y) * pitch + x of a plane.
// Shifted copies that make every load aligned were tried: three times the window, 1.2 to 1.4x slower.
struct GatedLattice {
  GatedLattice(int64_t height, int64_t width) : h(height), w(width), rows(height), pitch(width) {}

  int64_t h, w, rows, pitch;
  int64_t lead = 0;  // zeros before position 0
  int64_t span = 0;  // floats a plane

  int64_t image() const { return rows * pitch; }
  int64_t flat(int64_t n, int64_t y, int64_t x) const { return (n * rows + y) * pitch + x; }
  int64_t positions(int64_t samples) const { return (samples * image() + 15) / 16 * 16; }

  // Make room for the zeros that a step reads whose outputs lie here.
  void admit(const GatedStep &step, const GatedMap &in);
  void finish(int64_t samples);
  std::vector<uint8_t> valid(int64_t samples) const;

 private:
  int64_t above_ = 0, left_ = 0, below_ = 0, right_ = 0;  // farthest reads outside of the stored pixels
};

class GatedLists {
 public:
  GatedLists(const GatedStep &step, const GatedMap &in, const GatedMap &out, const GatedLattice &to);

  void load(const float *theta, const uint8_t *mask, const float *scale, const float *shift);

  // Floats of the phase planes that this step reads; 0 where it reads the map itself.
  int64_t phase_floats() const { return direct_ ? 0 : in_.channels * static_cast<int64_t>(planes_.size()) * to_span_; }
  void fill_phases(const GatedLattice &from, int64_t samples, const float *map, float *planes) const;

  bool dense() const { return dense_; }

  // All rows of one block of f.
  void run_values(const GatedKernels &kernels, GatedBlock block) const;

  // All rows of one block of g, the sums multiplied by `scale`; `all` has room for a block. Returns the maximum.
  float run_paths(const GatedKernels &kernels, GatedBlock block, float scale, float *all) const;

 private:
  // A plane of its own: in[y * stride + phase_y][x * stride + phase_x].
  struct Plane {
    int64_t phase_y, phase_x;
  };
  // Kept weights, or for g the pruned ones of a row that keeps more than half.
  struct Lists {
    std::vector<int64_t> begin;
    std::vector<int32_t> offsets;
    std::vector<float> values;
    std::vector<uint8_t> pruned;
  };

  void list_values(const float *theta, const uint8_t *mask);
  void list_tiles(const float *theta, const uint8_t *mask);
  void list_paths(const uint8_t *mask);

  GatedStep step_;
  GatedMap in_, out_;
  int64_t to_span_, to_rows_, to_pitch_, to_lead_;
  int64_t depth_ = 1, group_stride_ = 0;
  bool direct_ = true, dense_ = false;
  std::vector<Plane> planes_;
  std::vector<int32_t> offset_of_;  // of each column of the weight
  Lists values_, paths_;            // of f, rows or tiles; of g, rows
  std::vector<float> scale_, shift_;
};

}  // namespace paikern

// Where the pixels of all maps of one size lie in the planes of a chunk of samples.
//
// Sixteen floats behind each other, a unit, are one pixel of sixteen strips: each image is cut into `strips` strips of
// `rows` rows, and 16 / strips images share a unit. A shift by one pixel is then a shift by one unit, so the loads of
// every tap are whole cache lines: sums of kept weights run at 4.2 multiply-adds of 16 floats a ns, against 2.5 where
// the pixels of a row lie behind each other and nearly every load crosses a line (AVX-512, at most 6.0).
//
// A plane has `above` and `below` rows more than a strip: copies of the last rows of the strip before and the first
// ones of the next, zeros at the edges of the image. Rows end in zeros for what a tap reads left and right of them.
#pragma once

#include <cstdint>
#include <vector>

#include "gated.h"

namespace paikern {

struct GatedKernels;

constexpr int64_t kGatedUnit = 16;

class GatedLattice {
 public:
  GatedLattice(int64_t height, int64_t width) : h(height), w(width), pitch(width), tall_(height) {}

  int64_t h, w;
  int64_t strips = 1, groups = 1;  // strips an image; units at one pixel of a strip, as planes one behind the other
  int64_t rows = 1, above = 0, below = 0, pitch = 1;  // of a strip, pitch in units
  int64_t span = 0;                                   // floats a plane

  // Make room for the zeros that a step reads whose outputs lie here, from planes in this lattice.
  void admit(const GatedStep &step, const GatedMap &in);

  // Make room for those that a step reads of a map in this lattice.
  void admit_reader(const GatedStep &step, const GatedMap &out);

  // Floats a plane if an image were cut into `parts`, `count` units at one pixel.
  int64_t floats(int64_t parts, int64_t count) const;

  // Share of the arithmetic that falls on pixels, not on the rest of a last strip.
  double use(int64_t parts) const;

  void finish(int64_t parts, int64_t count);

  int64_t samples() const { return groups * (kGatedUnit / strips); }
  int64_t row_floats() const { return pitch * kGatedUnit; }
  int64_t group_floats() const { return (above + rows + below) * row_floats(); }
  int64_t origin(int64_t group, int64_t row) const {
    return left_ * kGatedUnit + group * group_floats() + (above + row) * row_floats();
  }

  // Pixel (y, x) of image n; the next x is kGatedUnit further.
  int64_t at(int64_t n, int64_t y, int64_t x) const {
    const int64_t images = kGatedUnit / strips;
    return origin(n / images, y % rows) + x * kGatedUnit + n % images * strips + y / rows;
  }

  // Bits of the strips that have a pixel in row `row`.
  uint32_t valid(int64_t row) const { return valid_[static_cast<size_t>(row)]; }

  // Whether all positions of a plane are pixels and behind each other.
  bool flat() const { return above == 0 && below == 0 && pitch == w && h == strips * rows; }

  // Copy the rows that neighbouring strips share, for `channels` planes.
  void fill_shared(const GatedKernels &kernels, int64_t channels, float *planes) const;

 private:
  int64_t tall_, left_ = 0;  // rows that some map in this lattice has; zeros before the first row
  std::vector<uint32_t> valid_;
};

// Whether a step that reads its input as it lies reads rows that strips share.
bool reads_shared(const GatedStep &step);

// The taps of one axis of a convolution: input index = (output index + shift) * stride + phase.
struct AxisTap {
  int64_t phase, shift;
};
AxisTap axis_tap(const GatedStep &step, int axis, int64_t tap);

}  // namespace paikern

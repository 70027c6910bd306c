#include "gated_lattice.h"

#include <algorithm>

#include "gated_kernels.h"
#include "path_plan.h"

namespace paikern {

AxisTap axis_tap(const GatedStep &step, int axis, int64_t tap) {
  const int64_t reach = tap * step.dilation[axis] - step.padding[axis];
  const int64_t shift = floor_divide(reach, step.stride[axis]);
  return {reach - shift * step.stride[axis], shift};
}

// How far the last output of a strip reads into the next one.
static int64_t behind(const GatedStep &s, int axis) {
  return (s.kernel[axis] - 1) * s.dilation[axis] - s.padding[axis] - (s.stride[axis] - 1);
}

bool reads_shared(const GatedStep &s) { return s.padding[0] > 0 || behind(s, 0) > 0; }

void GatedLattice::admit(const GatedStep &s, const GatedMap &in) {
  const int64_t first[2] = {axis_tap(s, 0, 0).shift, axis_tap(s, 1, 0).shift};
  const int64_t last[2] = {axis_tap(s, 0, s.kernel[0] - 1).shift, axis_tap(s, 1, s.kernel[1] - 1).shift};
  above = std::max(above, -first[0]);
  below = std::max(below, last[0]);
  tall_ = std::max(tall_, divide_up(in.h, s.stride[0]));
  const int64_t stored = divide_up(in.w, s.stride[1]);
  const int64_t before = std::max<int64_t>(0, -first[1]), behind = std::max<int64_t>(0, w + last[1] - stored);
  pitch = std::max({pitch, w, stored + std::max(before, behind)});
  left_ = std::max(left_, before);
}

void GatedLattice::admit_reader(const GatedStep &s, const GatedMap &out) {
  above = std::max(above, s.padding[0]);
  below = std::max(below, behind(s, 0));
  const int64_t right = (out.w - 1) * s.stride[1] + (s.kernel[1] - 1) * s.dilation[1] - s.padding[1] - (w - 1);
  pitch = std::max(pitch, w + std::max(s.padding[1], right));
  left_ = std::max(left_, s.padding[1]);
}

int64_t GatedLattice::floats(int64_t parts, int64_t count) const {
  // 2 behind the last row: what a column beside the pixels reads.
  const int64_t units = left_ + count * (above + divide_up(tall_, parts) + below) * pitch + 2;
  // 4 more than a multiple of 8: the windows of sixteen planes then fill the sets of a first cache evenly.
  return (round_up(units + 4, 8) - 4) * kGatedUnit;
}

double GatedLattice::use(int64_t parts) const {
  return static_cast<double>(h) / static_cast<double>(parts * divide_up(tall_, parts));
}

void GatedLattice::finish(int64_t parts, int64_t count) {
  strips = parts;
  groups = count;
  rows = divide_up(tall_, parts);
  span = floats(parts, groups);
  for (int64_t row = 0; row < rows; ++row) {
    uint32_t bits = 0;
    for (int64_t lane = 0; lane < kGatedUnit; ++lane) {
      if (lane % strips * rows + row < h) bits |= uint32_t{1} << lane;
    }
    valid_.push_back(bits);
  }
}

void GatedLattice::fill_shared(const GatedKernels &kernels, int64_t channels, float *planes) const {
  for (int64_t row = -above; row < rows + below; ++row) {
    if (row >= 0 && row < rows) continue;
    const int64_t by = floor_divide(row, rows);  // strips away
    uint32_t bits = 0;
    for (int64_t lane = 0; lane < kGatedUnit; ++lane) {
      const int64_t strip = lane % strips + by;
      if (strip >= 0 && strip < strips) bits |= uint32_t{1} << lane;
    }
    if (bits == 0) continue;  // zeros as they are
    for (int64_t channel = 0; channel < channels; ++channel) {
      for (int64_t group = 0; group < groups; ++group) {
        float *plane = planes + channel * span;
        kernels.shift(plane + origin(group, row - by * rows) + by, plane + origin(group, row), pitch, bits);
      }
    }
  }
}

}  // namespace paikern

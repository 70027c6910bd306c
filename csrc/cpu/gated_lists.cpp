#include "gated_lists.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "path_plan.h"

namespace paikern {
namespace {

// Above this density four channels that share each load win over lists of single weights: a tile skips only columns
// that none of its channels keeps, but a list loads once a multiply-add, 2.4 times as slow.
constexpr double kTileDensity = 0.3;

struct AxisTap {
  int64_t phase, shift;  // input index = (output index + shift) * stride + phase
};

AxisTap axis_tap(const GatedStep &s, int axis, int64_t u) {
  const int64_t reach = u * s.dilation[axis] - s.padding[axis];
  const int64_t shift = floor_divide(reach, s.stride[axis]);
  return {reach - shift * s.stride[axis], shift};
}

bool kept(const uint8_t *mask, int64_t i) { return !mask || (mask[i >> 3] >> (i & 7) & 1); }

}  // namespace

void GatedLattice::admit(const GatedStep &s, const GatedMap &in) {
  const int64_t out[2] = {h, w}, size[2] = {in.h, in.w};
  int64_t *extents[2] = {&rows, &pitch}, *before[2] = {&above_, &left_}, *behind[2] = {&below_, &right_};
  for (int a = 0; a < 2; ++a) {
    const int64_t stored = divide_up(size[a], s.stride[a]);
    const int64_t left = std::max<int64_t>(0, -axis_tap(s, a, 0).shift);
    const int64_t last = out[a] - 1 + axis_tap(s, a, s.kernel[a] - 1).shift;
    const int64_t right = std::max<int64_t>(0, last - (stored - 1));
    *extents[a] = std::max({*extents[a], out[a], stored + std::max(left, right)});
    *before[a] = std::max(*before[a], left);
    *behind[a] = std::max(*behind[a], axis_tap(s, a, s.kernel[a] - 1).shift);
  }
}

void GatedLattice::finish(int64_t samples) {
  lead = round_up(above_ * pitch + left_, 16);
  span = lead + positions(samples) + round_up(std::max<int64_t>(0, below_ * pitch + right_), 16) + 16;
  if (span % 1024 < 16) span += 16;  // planes of power-of-two maps off each other's cache sets
}

std::vector<uint8_t> GatedLattice::valid(int64_t samples) const {
  std::vector<uint8_t> bits(static_cast<size_t>(positions(samples) / 8 + 8), 0);
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t y = 0; y < h; ++y) {
      for (int64_t x = 0; x < w; ++x) {
        const int64_t q = flat(n, y, x);
        bits[static_cast<size_t>(q >> 3)] |= static_cast<uint8_t>(1 << (q & 7));
      }
    }
  }
  return bits;
}

GatedLists::GatedLists(const GatedStep &step, const GatedMap &in, const GatedMap &out, const GatedLattice &to)
    : step_(step), in_(in), out_(out), to_span_(to.span), to_rows_(to.rows), to_pitch_(to.pitch), to_lead_(to.lead) {
  if (step.kind == GatedKind::kElementwise) {
    for (int64_t c = 0; c < out.channels; ++c) values_.offsets.push_back(static_cast<int32_t>(c * to.span));
    for (int64_t c = 0; c <= out.channels; ++c) values_.begin.push_back(c);
    values_.values.assign(static_cast<size_t>(out.channels), 1.0f);
    values_.pruned.assign(static_cast<size_t>(out.channels), 0);
    paths_ = values_;
    return;
  }
  if (step.kind != GatedKind::kWeight) return;
  direct_ = step.stride[0] == 1 && step.stride[1] == 1 && in.h == out.h && in.w == out.w;
  const int64_t channels = in.channels / step.groups, taps = step.kernel[0] * step.kernel[1];
  std::vector<int64_t> plane_of, shifts;
  for (int64_t i = 0; i < step.kernel[0]; ++i) {
    for (int64_t j = 0; j < step.kernel[1]; ++j) {
      const AxisTap y = axis_tap(step, 0, i), x = axis_tap(step, 1, j);
      shifts.push_back(y.shift * to.pitch + x.shift);
      if (direct_) {
        plane_of.push_back(0);
        continue;
      }
      size_t at = 0;
      while (at < planes_.size() && (planes_[at].phase_y != y.phase || planes_[at].phase_x != x.phase)) ++at;
      if (at == planes_.size()) planes_.push_back({y.phase, x.phase});
      plane_of.push_back(static_cast<int64_t>(at));
    }
  }
  const int64_t stride = direct_ ? to.span : static_cast<int64_t>(planes_.size()) * to.span;
  depth_ = channels * taps;
  group_stride_ = channels * stride;
  if (in.channels * stride > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("gated: a map is too large for 32-bit offsets");
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (size_t t = 0; t < static_cast<size_t>(taps); ++t) {
      offset_of_.push_back(static_cast<int32_t>(c * stride + plane_of[t] * to.span + shifts[t]));
    }
  }
}

void GatedLists::fill_phases(const GatedLattice &from, int64_t samples, const float *map, float *planes) const {
  const int64_t sh = step_.stride[0], sw = step_.stride[1];
  for (int64_t c = 0; c < in_.channels; ++c) {
    const float *source = map + c * from.span + from.lead;
    for (size_t p = 0; p < planes_.size(); ++p) {
      const Plane &plane = planes_[p];
      const int64_t index = c * static_cast<int64_t>(planes_.size()) + static_cast<int64_t>(p);
      const int64_t columns = divide_up(in_.w - plane.phase_x, sw);
      float *target = planes + index * to_span_ + to_lead_;
      for (int64_t n = 0; n < samples; ++n) {
        for (int64_t y = plane.phase_y, i = 0; y < in_.h; y += sh, ++i) {
          const float *row = source + from.flat(n, y, plane.phase_x);
          float *to = target + (n * to_rows_ + i) * to_pitch_;
          for (int64_t x = 0; x < columns; ++x) to[x] = row[x * sw];
        }
      }
    }
  }
}

void GatedLists::load(const float *theta, const uint8_t *mask, const float *scale, const float *shift) {
  const size_t rows = static_cast<size_t>(out_.channels);
  scale_.assign(rows, 1.0f);
  shift_.assign(rows, 0.0f);
  if (scale) std::memcpy(scale_.data(), scale, sizeof(float) * rows);
  if (shift) std::memcpy(shift_.data(), shift, sizeof(float) * rows);
  if (step_.kind != GatedKind::kWeight) return;
  const int64_t numel = out_.channels * depth_;
  const double density = mask_density({theta, mask, numel, WeightType::kFloat32, 1});
  dense_ = density > kTileDensity && out_.channels / step_.groups % kGatedRows == 0;
  values_ = Lists{};
  values_.begin.push_back(0);
  if (dense_) {
    list_tiles(theta, mask);
  } else {
    list_values(theta, mask);
  }
  list_paths(mask);
}

void GatedLists::list_values(const float *theta, const uint8_t *mask) {
  for (int64_t r = 0; r < out_.channels; ++r) {
    for (int64_t i = 0; i < depth_; ++i) {
      if (!kept(mask, r * depth_ + i)) continue;
      values_.offsets.push_back(offset_of_[static_cast<size_t>(i)]);
      values_.values.push_back(theta[r * depth_ + i]);
    }
    values_.begin.push_back(static_cast<int64_t>(values_.offsets.size()));
  }
}

void GatedLists::list_tiles(const float *theta, const uint8_t *mask) {
  for (int64_t r = 0; r < out_.channels; r += kGatedRows) {
    for (int64_t i = 0; i < depth_; ++i) {
      float value[kGatedRows];
      bool any = false;
      for (int64_t k = 0; k < kGatedRows; ++k) {
        const int64_t at = (r + k) * depth_ + i;
        const bool keep = kept(mask, at);
        value[k] = keep ? theta[at] : 0.0f;
        any |= keep;
      }
      if (!any) continue;
      values_.offsets.push_back(offset_of_[static_cast<size_t>(i)]);
      values_.values.insert(values_.values.end(), value, value + kGatedRows);
    }
    values_.begin.push_back(static_cast<int64_t>(values_.offsets.size()));
  }
}

void GatedLists::list_paths(const uint8_t *mask) {
  paths_ = Lists{};
  paths_.begin.push_back(0);
  for (int64_t r = 0; r < out_.channels; ++r) {
    int64_t count = 0;
    for (int64_t i = 0; i < depth_; ++i) count += kept(mask, r * depth_ + i);
    const bool pruned = 2 * count > depth_;
    for (int64_t i = 0; i < depth_; ++i) {
      if (kept(mask, r * depth_ + i) != pruned) paths_.offsets.push_back(offset_of_[static_cast<size_t>(i)]);
    }
    paths_.begin.push_back(static_cast<int64_t>(paths_.offsets.size()));
    paths_.pruned.push_back(pruned);
  }
}

void GatedLists::run_values(const GatedKernels &kernels, GatedBlock block) const {
  const int64_t each = dense_ ? kGatedRows : 1, group_rows = out_.channels / step_.groups;
  const float *base = block.base;
  for (int64_t r = 0, i = 0; r < out_.channels; r += each, ++i) {
    const int64_t from = values_.begin[static_cast<size_t>(i)];
    const int64_t count = values_.begin[static_cast<size_t>(i) + 1] - from;
    block.base = base + r / group_rows * group_stride_;
    const auto run = dense_ ? kernels.tile : kernels.gather;
    run(block, values_.offsets.data() + from, values_.values.data() + from * each, count, scale_.data() + r,
        shift_.data() + r);
    block.out += each * block.stride;
    if (block.add) block.add += each * block.stride;
  }
}

float GatedLists::run_paths(const GatedKernels &kernels, GatedBlock block, float scale, float *all) const {
  const int64_t group_rows = out_.channels / step_.groups;
  const float *base = block.base;
  float top = 0.0f;
  int64_t summed = -1;  // the group whose sum over all columns is in `all`
  for (int64_t r = 0; r < out_.channels; ++r) {
    const int64_t from = paths_.begin[static_cast<size_t>(r)], group = r / group_rows;
    const int64_t count = paths_.begin[static_cast<size_t>(r) + 1] - from;
    block.base = base + group * group_stride_;
    block.all = nullptr;
    if (paths_.pruned[static_cast<size_t>(r)]) {
      if (summed != group) kernels.sum(block, offset_of_.data(), depth_, all);
      summed = group;
      block.all = all;
    }
    top = std::max(top, kernels.paths(block, paths_.offsets.data() + from, count, scale));
    block.out += block.stride;
    if (block.add) block.add += block.stride;
    if (block.gate) block.gate += block.stride;
  }
  return top;
}

}  // namespace paikern

#include "gated_lists.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "path_plan.h"

namespace paikern {
namespace {

// Above this density four channels that share each load win over lists of single weights: a tile skips only columns
// that none of its channels keeps, and a list loads once a multiply-add.
constexpr double kTileDensity = 0.45;

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

GatedLists::GatedLists(const GatedStep &step, const GatedMap &in, const GatedMap &out, const GatedLattice &from,
                       const GatedLattice &to)
    : step_(step), in_(in), out_(out), to_span_(to.span), to_rows_(to.rows), to_pitch_(to.pitch), to_lead_(to.lead) {
  if (step.kind == GatedKind::kElementwise) {
    begin_.resize(static_cast<size_t>(out.channels) + 1);
    for (int64_t c = 0; c < out.channels; ++c) offsets_.push_back(static_cast<int32_t>(c * to.span));
    for (int64_t c = 0; c <= out.channels; ++c) begin_[static_cast<size_t>(c)] = c;
    values_.assign(offsets_.size(), 1.0f);
    return;
  }
  if (step.kind != GatedKind::kWeight) return;
  direct_ = step.stride[0] == 1 && step.stride[1] == 1 && in.h == out.h && in.w == out.w;
  phases_ = direct_ ? 1 : step.stride[0] * step.stride[1];
  const int64_t channels = in.channels / step.groups;
  depth_ = channels * step.kernel[0] * step.kernel[1];
  group_stride_ = channels * phases_ * to.span;
  if (in.channels * phases_ * to.span + to.lead > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("gated: a map is too large for 32-bit offsets");
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < step.kernel[0]; ++i) {
      for (int64_t j = 0; j < step.kernel[1]; ++j) {
        const AxisTap y = axis_tap(step, 0, i), x = axis_tap(step, 1, j);
        const int64_t plane = c * phases_ + (direct_ ? 0 : y.phase * step.stride[1] + x.phase);
        offset_of_.push_back(static_cast<int32_t>(plane * to.span + y.shift * to.pitch + x.shift));
      }
    }
  }
  (void)from;
}

void GatedLists::fill_phases(const GatedLattice &from, int64_t samples, const float *map, float *planes) const {
  const int64_t sh = step_.stride[0], sw = step_.stride[1];
  for (int64_t c = 0; c < in_.channels; ++c) {
    const float *source = map + c * from.span + from.lead;
    float *target = planes + c * phases_ * to_span_ + to_lead_;
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t y = 0; y < in_.h; ++y) {
        const float *row = source + from.flat(n, y, 0);
        float *to = target + y % sh * sw * to_span_ + (n * to_rows_ + y / sh) * to_pitch_;
        if (sw == 1) {
          std::memcpy(to, row, sizeof(float) * static_cast<size_t>(in_.w));
          continue;
        }
        for (int64_t r = 0; r < sw; ++r, to += to_span_) {
          for (int64_t x = r, i = 0; x < in_.w; x += sw, ++i) to[i] = row[x];
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
  begin_.assign(1, 0);
  offsets_.clear();
  values_.clear();
  ones_.clear();
  if (dense_) {
    list_tiles(theta, mask);
  } else {
    list_rows(theta, mask);
  }
}

void GatedLists::list_rows(const float *theta, const uint8_t *mask) {
  for (int64_t r = 0; r < out_.channels; ++r) {
    for (int64_t i = 0; i < depth_; ++i) {
      if (!kept(mask, r * depth_ + i)) continue;
      offsets_.push_back(offset_of_[static_cast<size_t>(i)]);
      values_.push_back(theta[r * depth_ + i]);
    }
    begin_.push_back(static_cast<int64_t>(offsets_.size()));
  }
}

void GatedLists::list_tiles(const float *theta, const uint8_t *mask) {
  for (int64_t r = 0; r < out_.channels; r += kGatedRows) {
    for (int64_t i = 0; i < depth_; ++i) {
      float value[kGatedRows], one[kGatedRows], any = 0.0f;
      for (int64_t k = 0; k < kGatedRows; ++k) {
        const int64_t at = (r + k) * depth_ + i;
        one[k] = kept(mask, at) ? 1.0f : 0.0f;
        value[k] = one[k] > 0.0f ? theta[at] : 0.0f;
        any += one[k];
      }
      if (any == 0.0f) continue;
      offsets_.push_back(offset_of_[static_cast<size_t>(i)]);
      values_.insert(values_.end(), value, value + kGatedRows);
      ones_.insert(ones_.end(), one, one + kGatedRows);
    }
    begin_.push_back(static_cast<int64_t>(offsets_.size()));
  }
}

float GatedLists::run(const GatedKernels &kernels, GatedBlock block, bool paths, float g_scale) const {
  static constexpr float kNoShift[kGatedRows] = {};
  const float factors[kGatedRows] = {g_scale, g_scale, g_scale, g_scale};
  const int64_t each = dense_ ? kGatedRows : 1, group_rows = out_.channels / step_.groups;
  const float *base = block.base;
  float top = 0.0f;
  for (int64_t r = 0, i = 0; r < out_.channels; r += each, ++i) {
    const int64_t from = begin_[static_cast<size_t>(i)], count = begin_[static_cast<size_t>(i) + 1] - from;
    block.base = base + r / group_rows * group_stride_;
    const int32_t *offsets = offsets_.data() + from;
    const float *scale = scale_.data() + r, *shift = shift_.data() + r;
    float found;
    if (dense_) {
      const float *values = (paths ? ones_.data() : values_.data()) + from * kGatedRows;
      found = paths ? kernels.tile(block, offsets, values, count, factors, kNoShift)
                    : kernels.tile(block, offsets, values, count, scale, shift);
    } else {
      found = paths ? kernels.gather(block, offsets, nullptr, count, g_scale, 0.0f)
                    : kernels.gather(block, offsets, values_.data() + from, count, *scale, *shift);
    }
    top = std::max(top, found);
    block.out += each * block.stride;
    if (block.add) block.add += each * block.stride;
    if (block.gate) block.gate += each * block.stride;
  }
  return top;
}

}  // namespace paikern

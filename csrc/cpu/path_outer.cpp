#include "path_outer.h"

namespace paikern {

OuterMaps::OuterMaps(const PathGeometry &geometry, const float *x, const float *g)
    : geometry_(geometry), g_(g), linear_(geometry.linear()), positions_(0), x_planes_(0), g_planes_(0) {
  if (linear_) {  // x [batch, channels] already has the columns side by side; rows get room for
                  // whole vectors
    positions_ = geometry.batch;
    ld_ = round_up(geometry.channels, 16) + 16;
    x_planes_ = FloatBuffer(positions_ * ld_);
    for (int64_t n = 0; n < positions_; ++n) {
      float *row = x_planes_.get() + n * ld_;
      std::memcpy(row, x + n * geometry.channels, sizeof(float) * static_cast<size_t>(geometry.channels));
      std::memset(row + geometry.channels, 0, sizeof(float) * static_cast<size_t>(ld_ - geometry.channels));
    }
    for (int64_t n = 0; n < positions_; ++n) offsets_.push_back(n * ld_);
    return;
  }
  const ForwardPlan plan = plan_forward(geometry, geometry.batch);
  span_ = plan.lattice.span;
  lead_ = plan.lattice.lead;
  positions_ = plan.lattice.positions;
  const int64_t plane_stride = static_cast<int64_t>(plan.planes.size()) * span_;
  x_group_ = geometry.group_channels() * plane_stride;
  x_planes_ = FloatBuffer(geometry.channels * plane_stride + 64);
  g_planes_ = FloatBuffer(geometry.rows * span_ + 64);
  fill_planes(plan.lattice, plan.planes, geometry.batch, geometry.channels, x, x_planes_.get());
  // Zeros between the rows of G cancel the positions that no output has.
  fill_planes(plan.lattice, {whole_grid(geometry.out)}, geometry.batch, geometry.rows, g, g_planes_.get());
  offsets_.reserve(static_cast<size_t>(geometry.depth()));
  for (int64_t c = 0; c < geometry.group_channels(); ++c) {
    for (const Tap &tap : plan.taps) offsets_.push_back(c * plane_stride + tap.phase * span_ + tap.shift);
  }
}

void OuterMaps::pack_rows(int64_t group, int64_t r0, int64_t rows, int64_t q0, int64_t depth, float *a) const {
  const int64_t panel = path_kernels().tile_rows, padded = round_up(rows, panel);
  if (linear_) {
    for (int64_t p = 0; p < padded; p += panel) {
      for (int64_t k = 0; k < depth; ++k) {
        float *target = a + p * kDepth + k * panel;
        for (int64_t r = 0; r < panel; ++r) {
          target[r] = p + r < rows ? g_[(q0 + k) * geometry_.rows + r0 + p + r] : 0.0f;
        }
      }
    }
    return;
  }
  for (int64_t r = 0; r < padded; ++r) {
    const size_t bytes = sizeof(float) * static_cast<size_t>(depth);
    const int64_t row = group * geometry_.group_rows() + r0 + r;
    if (r < rows) {
      std::memcpy(a + r * kDepth, g_planes_.get() + row * span_ + lead_ + q0, bytes);
    } else {
      std::memset(a + r * kDepth, 0, bytes);
    }
  }
}

void OuterMaps::pack_columns(int64_t group, int64_t j0, int64_t count, int64_t q0, int64_t depth, float *b) const {
  const PathKernels &kernels = path_kernels();
  if (linear_) {
    kernels.pack_columns(x_planes_.get() + j0, offsets_.data() + q0, depth, round_up(count, kernels.lanes), b);
  } else {
    kernels.pack_transposed(x_planes_.get() + lead_ + group * x_group_ + q0, offsets_.data() + j0, count, depth, b);
  }
}

float OuterMaps::nearly(int64_t row, int64_t column) const {
  float sum = 0.0f;
  if (linear_) {
    for (int64_t n = 0; n < positions_; ++n) sum += x_planes_.get()[n * ld_ + column] * g_[n * geometry_.rows + row];
    return sum;
  }
  const int64_t group = row / geometry_.group_rows();
  const float *x = x_planes_.get() + lead_ + group * x_group_ + offsets_[static_cast<size_t>(column)];
  const float *g = g_planes_.get() + row * span_ + lead_;
  float lane[16] = {};
  int64_t q = 0;
  for (; q + 16 <= positions_; q += 16) {
    for (int64_t j = 0; j < 16; ++j) lane[j] += x[q + j] * g[q + j];
  }
  for (; q < positions_; ++q) lane[0] += x[q] * g[q];
  for (const float part : lane) sum += part;
  return sum;
}

}  // namespace paikern

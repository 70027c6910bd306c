#include "flow.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bits.h"
#include "maps.h"
#include "path_plan.h"

namespace paikern {
namespace {

// Path counts are integers times means: one that would underflow is held at 2**-60 of the maximum, so that "reached"
// and "not reached" never depend on rounding. It cannot matter before 2**50.
constexpr float kFloor = 0x1p-60f;
constexpr int64_t kFloorFrom = 50;

// V x, or V^T x where the step uses the stored matrix the other way round.
void product(const FlowStep &step, bool adjoint, const float *from, float *to, int64_t numel) {
  if (numel == 0) return;
  if (step.compact) {
    if (adjoint != step.transposed) {
      step.compact->backward(from, to);
    } else {
      step.compact->forward(from, to);
    }
  } else if (adjoint != step.transposed) {
    path_backward(step.geometry, step.weight, from, to);
  } else {
    path_forward(step.geometry, step.weight, from, to);
  }
}

void copy_bits(const uint8_t *mask, int64_t bytes, int64_t first, int64_t count, std::vector<uint8_t> &to) {
  to.assign(static_cast<size_t>(divide_up(count, 8)) + 8, 0);
  for (int64_t done = 0; done < count; done += 32) {
    const int n = static_cast<int>(std::min<int64_t>(32, count - done));
    const uint64_t word = mask_bits(mask, bytes, first + done, n);
    std::memcpy(to.data() + done / 8, &word, 4);
  }
}

}  // namespace

double PathFlow::forward() {
  dead_ = broken_ = -1;
  log_maxima_ = 0.0;
  for (FlowValue &v : values_) {
    v.arrived = false;
    if (!v.start) continue;
    v.a_exponent = 0;
    std::fill(v.a, v.a + v.numel, 1.0f);
  }
  for (int64_t i = 0; i < static_cast<int64_t>(steps_.size()); ++i) {
    if (steps_[static_cast<size_t>(i)].kind != FlowKind::kWeight) {
      forward_small(i);
    } else if (!forward_weight(i)) {
      return -INFINITY;
    }
  }
  return sum_up();
}

// False where there is nothing to go on with.
bool PathFlow::forward_weight(int64_t index) {
  FlowStep &step = steps_[static_cast<size_t>(index)];
  FlowValue &in = value(step.inputs[0]), &out = value(step.output);
  step.weight.mask = step.parameter < 0 ? nullptr : masks_[static_cast<size_t>(step.parameter)];
  if (step.by_rows && step.weight.mask) {
    const int64_t end = step.first_bit + step.weight.numel;
    copy_bits(step.weight.mask, divide_up(end, 8), step.first_bit, step.weight.numel, step.row_mask);
    step.weight.mask = step.row_mask.data();
  }
  step.weight.density = -1.0;
  step.weight.density = mask_density(step.weight);  // asked for in both sweeps
  const float *x = in.a;
  out.a_exponent = in.a_exponent;
  if (rules_.by_input_max) {
    const float maximum = map_maximum(x, in.numel);
    step.maximum = static_cast<double>(maximum);
    if (!(maximum > 0.0f)) {
      dead_ = index;
      return false;
    }
    log_maxima_ += std::log(step.maximum);
    for (int64_t i = 0; i < in.numel; ++i) step.divided[i] = x[i] / maximum;
    x = step.divided;
  }
  product(step, false, x, out.a, out.numel);
  if (!rules_.by_input_max) {
    int64_t shift = 0;
    float maximum = 0.0f;
    if (!normalise(out.a, out.numel, in.a_exponent, &shift, &maximum)) {
      broken_ = index;
      return false;
    }
    out.a_exponent += shift;
    if (maximum <= 0.0f && dead_ < 0) dead_ = index;
  }
  if (step.offset) scale_forward(step, out.a, out.a_exponent, out.a);
  return true;
}

void PathFlow::forward_small(int64_t index) {
  FlowStep &step = steps_[static_cast<size_t>(index)];
  FlowValue &in = value(step.inputs[0]), &out = value(step.output);
  out.a_exponent = in.a_exponent;
  switch (step.kind) {
    case FlowKind::kAdd: {
      for (const int64_t id : step.inputs) out.a_exponent = std::max(out.a_exponent, value(id).a_exponent);
      const float floor = rules_.counts ? kFloor : 0.0f;
      std::memcpy(out.a, in.a, sizeof(float) * static_cast<size_t>(out.numel));
      int64_t shift = in.a_exponent - out.a_exponent;  // of the sum so far
      for (size_t i = 1; i < step.inputs.size(); ++i) {
        const FlowValue &other = value(step.inputs[i]);
        add_shifted(out.a, shift, other.a, other.a_exponent - out.a_exponent, out.numel, floor);
        shift = 0;
      }
      break;
    }
    case FlowKind::kScale:
      scale_forward(step, in.a, in.a_exponent, out.a);
      break;
    case FlowKind::kRectify:
      for (int64_t i = 0; i < out.numel; ++i) out.a[i] = in.a[i] > 0.0f ? in.a[i] : 0.0f;
      break;
    case FlowKind::kMean:
      mean_forward(step, in.a, out.a);
      break;
    case FlowKind::kMaxPool:
      max_pool_forward(step.pool, in.a, out.a, step.argmax);
      break;
    default: {
      std::vector<int64_t> exponents;
      for (const int64_t id : step.inputs) {
        exponents.push_back(value(id).a_exponent);
        out.a_exponent = std::max(out.a_exponent, value(id).a_exponent);
      }
      calls_.forward(index, exponents);
    }
  }
}

double PathFlow::sum_up() {
  top_ = value(outputs_[0]).a_exponent;
  for (const int64_t id : outputs_) top_ = std::max(top_, value(id).a_exponent);
  mantissa_ = 0.0;
  for (const int64_t id : outputs_) {
    const FlowValue &out = value(id);
    double sum = 0.0;
    for (int64_t i = 0; i < out.numel; ++i) sum += static_cast<double>(out.a[i]);
    mantissa_ += std::ldexp(sum, static_cast<int>(std::max<int64_t>(out.a_exponent - top_, -2000)));
  }
  if (!(mantissa_ > 0.0)) return mantissa_ == 0.0 ? -INFINITY : NAN;
  return std::log(mantissa_) + static_cast<double>(top_) * std::log(2.0) + (rules_.by_input_max ? log_maxima_ : 0.0);
}

void PathFlow::backward(const Visit &visit) {
  for (FlowValue &v : values_) v.arrived = false;
  const float seed = rules_.by_input_max ? static_cast<float>(1.0 / mantissa_) : 1.0f;
  for (size_t o = 0; o < outputs_.size(); ++o) {
    FlowValue &out = value(outputs_[o]);
    if (out.start) continue;
    if (cotangent_[o]) {
      std::memcpy(out.g, cotangent_[o], sizeof(float) * static_cast<size_t>(out.numel));
    } else {
      std::fill(out.g, out.g + out.numel, seed);
    }
    out.g_exponent = 0;
    out.arrived = true;
  }
  for (int64_t i = static_cast<int64_t>(steps_.size()) - 1; i >= 0; --i) {
    FlowStep &step = steps_[static_cast<size_t>(i)];
    FlowValue &out = value(step.output);
    if (!out.arrived) continue;
    out.arrived = false;
    if (step.kind == FlowKind::kWeight) {
      backward_weight(step, visit);
      if (broken_ >= 0) return;
    } else {
      backward_small(i);
    }
  }
}

void PathFlow::backward_weight(FlowStep &step, const Visit &visit) {
  FlowValue &in = value(step.inputs[0]), &out = value(step.output);
  const float *x = rules_.by_input_max ? step.divided : in.a;
  FloatBuffer scratch(0);
  float *gx = in.start ? nullptr : target(in, &scratch);
  const bool swept = visit(step, x, out.g, in.a_exponent + out.g_exponent, out, gx);
  if (in.start) return;
  if (!swept) product(step, true, out.g, gx, in.numel);
  int64_t exponent = out.g_exponent;
  if (rules_.by_input_max) {
    through_maximum(gx, x, in.numel, step.maximum);
  } else {
    int64_t shift = 0;
    float maximum = 0.0f;
    if (!normalise(gx, in.numel, exponent, &shift, &maximum)) {
      broken_ = &step - steps_.data();
      return;
    }
    exponent += shift;
  }
  arrive(in, gx, exponent);
}

void PathFlow::backward_small(int64_t index) {
  FlowStep &step = steps_[static_cast<size_t>(index)];
  FlowValue &out = value(step.output);
  if (step.kind == FlowKind::kAdd) {
    for (const int64_t id : step.inputs) {
      if (!value(id).start) arrive(value(id), out.g, out.g_exponent);
    }
    return;
  }
  if (step.kind == FlowKind::kCall) {
    const std::vector<const float *> parts = calls_.adjoint(index);
    for (size_t i = 0; i < parts.size(); ++i) {
      FlowValue &in = value(step.inputs[i]);
      if (!in.start) arrive(in, parts[i], out.g_exponent);
    }
    return;
  }
  FlowValue &in = value(step.inputs[0]);
  if (in.start) return;
  FloatBuffer scratch(0);
  float *gx = target(in, &scratch);
  switch (step.kind) {
    case FlowKind::kScale:
      scale_adjoint(step, out.g, gx);
      break;
    case FlowKind::kRectify:
      for (int64_t i = 0; i < out.numel; ++i) gx[i] = out.a[i] > 0.0f ? out.g[i] : 0.0f;
      break;
    case FlowKind::kMean:
      mean_adjoint(step, out.g, gx);
      break;
    default:
      max_pool_adjoint(step.pool, out.g, step.argmax, gx);
  }
  arrive(in, gx, out.g_exponent);
}

bool PathFlow::normalise(float *values, int64_t numel, int64_t before, int64_t *shift, float *maximum) {
  const float top = *maximum = map_maximum(values, numel);
  if (!std::isfinite(top)) return false;
  int exponent = 0;
  if (top > 0.0f) {
    std::frexp(top, &exponent);
    exponent -= 1;
  }
  *shift = exponent;
  const float floor = rules_.counts && std::abs(before + exponent) > kFloorFrom ? kFloor : 0.0f;
  if (exponent != 0 || floor > 0.0f) map_scale(values, numel, -exponent, floor);
  return true;
}

float *PathFlow::target(FlowValue &to, FloatBuffer *scratch) {
  if (!to.arrived) return to.g;
  *scratch = FloatBuffer(to.numel);
  return scratch->get();
}

void PathFlow::arrive(FlowValue &to, const float *part, int64_t exponent) {
  if (!to.arrived) {
    if (part != to.g) std::memcpy(to.g, part, sizeof(float) * static_cast<size_t>(to.numel));
    to.g_exponent = exponent;
    to.arrived = true;
    return;
  }
  const int64_t top = std::max(to.g_exponent, exponent);
  add_shifted(to.g, to.g_exponent - top, part, exponent - top, to.numel, 0.0f);
  to.g_exponent = top;
}

}  // namespace paikern

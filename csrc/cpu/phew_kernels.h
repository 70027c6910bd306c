// Reading kernels of a weight: the magnitude of one, of any storage type.
#pragma once

#include <cmath>

#include "halves.h"
#include "phew.h"

namespace paikern {

struct Bfloat16 {
  uint16_t raw;
};
struct Float16 {
  uint16_t raw;
};

static inline double to_double(float value) { return static_cast<double>(value); }
static inline double to_double(double value) { return value; }
static inline double to_double(Bfloat16 value) { return static_cast<double>(bfloat16_to_float(value.raw)); }
static inline double to_double(Float16 value) { return static_cast<double>(float16_to_float(value.raw)); }

// |w| or w * w.
template <bool kSquare, class T>
static inline double magnitude(T value) {
  const double wide = to_double(value);
  return kSquare ? wide * wide : std::fabs(wide);
}

// n of one kernel, or 1 / n (0 where n is 0).
template <int kWeighting, class T>
static inline double kernel_share(const T *kernel, int64_t taps) {
  double n = magnitude<kWeighting == 1>(kernel[0]);
  for (int64_t tap = 1; tap < taps; ++tap) n += magnitude<kWeighting == 1>(kernel[tap]);
  if constexpr (kWeighting == 2) return n > 0.0 ? 1.0 / n : 0.0;
  return n;
}

// Calls run(pointer, std::integral_constant<int, weighting>) with the weight's storage type.
template <class Run>
void with_type(const WalkWeight &weight, int weighting, Run run) {
  const auto typed = [&](auto *data) {
    if (weighting == 0) run(data, std::integral_constant<int, 0>());
    if (weighting == 1) run(data, std::integral_constant<int, 1>());
    if (weighting == 2) run(data, std::integral_constant<int, 2>());
  };
  switch (weight.type) {
    case 0:
      return typed(static_cast<const float *>(weight.data));
    case 1:
      return typed(static_cast<const Bfloat16 *>(weight.data));
    case 2:
      return typed(static_cast<const Float16 *>(weight.data));
    default:
      return typed(static_cast<const double *>(weight.data));
  }
}

}  // namespace paikern

#include "maps.h"

#include <cmath>

#include "path_kernels.h"

namespace paikern {

float map_maximum(const float *values, int64_t numel) { return path_kernels().maximum(values, numel); }

void map_scale(float *values, int64_t numel, int by, float floor) {
  const float factor = std::ldexp(1.0f, by);
  if (floor > 0.0f) {
    for (int64_t i = 0; i < numel; ++i) {
      const float v = values[i] * factor;
      values[i] = values[i] > 0.0f && v < floor ? floor : v;
    }
  } else {
    for (int64_t i = 0; i < numel; ++i) values[i] *= factor;
  }
}

void live_nodes(const float *y, const float *g, int64_t outer, int64_t channels, int64_t inner, uint8_t *live) {
  for (int64_t c = 0; c < channels; ++c) live[c] = 0;
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t c = 0; c < channels; ++c) {
      const float *ys = y + (o * channels + c) * inner, *gs = g + (o * channels + c) * inner;
      for (int64_t i = 0; i < inner && !live[c]; ++i) live[c] = ys[i] > 0.0f && gs[i] != 0.0f;
    }
  }
}

void through_maximum(float *g, const float *x, int64_t numel, double maximum) {
  constexpr int kLanes = 8;
  double lanes[kLanes] = {};
  int64_t ties = 0, i = 0;
  for (; i + kLanes <= numel; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      lanes[j] += static_cast<double>(g[i + j]) * static_cast<double>(x[i + j]);
      ties += x[i + j] == 1.0f;
    }
  }
  double dot = 0.0;
  for (const double lane : lanes) dot += lane;
  for (; i < numel; ++i) {
    dot += static_cast<double>(g[i]) * static_cast<double>(x[i]);
    ties += x[i] == 1.0f;
  }
  const float share = ties > 0 ? static_cast<float>((1.0 - dot) / static_cast<double>(ties)) : 0.0f;
  const float inverse = static_cast<float>(1.0 / maximum);
  for (int64_t k = 0; k < numel; ++k) g[k] = (g[k] + (x[k] == 1.0f ? share : 0.0f)) * inverse;
}

}  // namespace paikern

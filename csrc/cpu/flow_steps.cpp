// The steps between weights: each is one pass over a map of the size of an activation.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "flow.h"

namespace paikern {
namespace {

float power_of_two(int64_t exponent) {
  return std::ldexp(1.0f, static_cast<int>(std::clamp<int64_t>(exponent, -1000, 1000)));
}

float floored(float v, float factor, float floor) {
  const float scaled = v * factor;
  return v > 0.0f && scaled < floor ? floor : scaled;
}

}  // namespace

void add_shifted(float *to, int64_t to_shift, const float *part, int64_t part_shift, int64_t numel, float floor) {
  const float a = power_of_two(to_shift), b = power_of_two(part_shift);
  if (to_shift == 0 && part_shift == 0) {
    for (int64_t i = 0; i < numel; ++i) to[i] += part[i];
  } else if (floor == 0.0f) {
    for (int64_t i = 0; i < numel; ++i) to[i] = to[i] * a + part[i] * b;
  } else {
    const float to_floor = to_shift == 0 ? 0.0f : floor, part_floor = part_shift == 0 ? 0.0f : floor;
    for (int64_t i = 0; i < numel; ++i) to[i] = floored(to[i], a, to_floor) + floored(part[i], b, part_floor);
  }
}

void scale_forward(const FlowStep &step, const float *x, int64_t exponent, float *y) {
  for (int64_t o = 0; o < step.outer; ++o) {
    for (int64_t c = 0; c < step.channels; ++c) {
      const int64_t at = (o * step.channels + c) * step.inner;
      const float factor = step.factor ? step.factor[c] : 1.0f;
      const float offset = step.offset ? step.offset[c] * power_of_two(-exponent) : 0.0f;
      for (int64_t i = at; i < at + step.inner; ++i) y[i] = x[i] * factor + offset;
    }
  }
}

void scale_adjoint(const FlowStep &step, const float *g, float *gx) {
  for (int64_t o = 0; o < step.outer; ++o) {
    for (int64_t c = 0; c < step.channels; ++c) {
      const int64_t at = (o * step.channels + c) * step.inner;
      const float factor = step.factor ? step.factor[c] : 1.0f;
      for (int64_t i = at; i < at + step.inner; ++i) gx[i] = g[i] * factor;
    }
  }
}

void mean_forward(const FlowStep &step, const float *x, float *y) {
  const double divisor = step.average ? static_cast<double>(step.channels) : 1.0;
  for (int64_t o = 0; o < step.outer; ++o) {
    for (int64_t i = 0; i < step.inner; ++i) {
      double sum = 0.0;
      for (int64_t c = 0; c < step.channels; ++c) {
        sum += static_cast<double>(x[(o * step.channels + c) * step.inner + i]);
      }
      y[o * step.inner + i] = static_cast<float>(sum / divisor);
    }
  }
}

void mean_adjoint(const FlowStep &step, const float *g, float *gx) {
  const float divisor = step.average ? static_cast<float>(step.channels) : 1.0f;
  for (int64_t o = 0; o < step.outer; ++o) {
    for (int64_t c = 0; c < step.channels; ++c) {
      for (int64_t i = 0; i < step.inner; ++i) {
        gx[(o * step.channels + c) * step.inner + i] = g[o * step.inner + i] / divisor;
      }
    }
  }
}

// The first maximum of a window in row-major order, as PyTorch has it.
namespace {

// The first and the end of the inputs of a window that lie on the map.
std::pair<int64_t, int64_t> window(const PoolShape &p, int axis, int64_t out) {
  const int64_t first = out * p.stride[axis] - p.padding[axis], step = p.dilation[axis];
  const int64_t skipped = first < 0 ? divide_up(-first, step) : 0;
  return {first + skipped * step, std::min(p.size[axis], first + (p.kernel[axis] - 1) * step + 1)};
}

}  // namespace

void max_pool_forward(const PoolShape &p, const float *all, float *tops, int32_t *places) {
  const int64_t windows = p.out[0] * p.out[1], pixels = p.size[0] * p.size[1];
#pragma omp parallel for schedule(static) if (p.planes * pixels > parallel_work() / 8)
  for (int64_t n = 0; n < p.planes; ++n) {
    const float *x = all + n * pixels;
    float *y = tops + n * windows;
    int32_t *argmax = places + n * windows;
    for (int64_t oh = 0; oh < p.out[0]; ++oh) {
      const auto [h0, h1] = window(p, 0, oh);
      for (int64_t ow = 0; ow < p.out[1]; ++ow, ++y, ++argmax) {
        const auto [w0, w1] = window(p, 1, ow);
        float best = -INFINITY;
        int64_t where = -1;
        for (int64_t h = h0; h < h1; h += p.dilation[0]) {
          for (int64_t w = w0; w < w1; w += p.dilation[1]) {
            const float v = x[h * p.size[1] + w];
            if (where < 0 || v > best || v != v) {
              best = v;
              where = h * p.size[1] + w;
            }
          }
        }
        *y = best;
        *argmax = static_cast<int32_t>(where);
      }
    }
  }
}

void max_pool_adjoint(const PoolShape &p, const float *g, const int32_t *argmax, float *gx) {
  const int64_t windows = p.out[0] * p.out[1], pixels = p.size[0] * p.size[1];
  std::memset(gx, 0, sizeof(float) * static_cast<size_t>(p.planes * pixels));
  for (int64_t n = 0; n < p.planes; ++n, gx += pixels, g += windows, argmax += windows) {
    for (int64_t i = 0; i < windows; ++i) gx[argmax[i]] += g[i];
  }
}

}  // namespace paikern

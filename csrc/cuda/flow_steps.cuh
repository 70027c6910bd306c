// The instructions of a device sweep between its products: each is one pass over maps of the size of an activation.
//
//   fill       y = 1, or what is given                     join     y = sum of terms, each brought to one power of two
//   scale      y[o, c, i] = x[o, c, i] * factor[c] + offset[c]   normalise  x = x as it is read, for many maps
//   rectify    y = x where it is above 0                unrectify  its adjoint
//   mean       y[o, i] = sum over c of x[o, c, i] / C      spread   its adjoint
//   pool       maxima of windows, and where they were      unpool   its adjoint, gathered: no atomics
//   bits       layers without a weight
//
// Bytes moved: each map read and written once. Limit: bandwidth of the caches; most maps never leave them. Not yet
// measured on a GPU.
//
// Device code without standard headers: nvcc, NVRTC and csrc/testing/cuda_on_cpu.h compile the same text.
#pragma once

#include "dpai.cuh"
#include "maps.cuh"
#include "path_maps.cuh"
#include "select.cuh"

constexpr long long kPkFlowReset = 0, kPkFlowFill = 1, kPkFlowForward = 2, kPkFlowAdjoint = 3, kPkFlowJoin = 4,
                    kPkFlowNormalise = 5, kPkFlowScale = 6, kPkFlowMean = 7, kPkFlowSpread = 8, kPkFlowPool = 9,
                    kPkFlowUnpool = 10, kPkFlowTotal = 11, kPkFlowRecord = 12, kPkFlowExponents = 13, kPkFlowBits = 14,
                    kPkFlowScore = 15, kPkFlowLive = 16, kPkFlowDpai = 17, kPkFlowRectify = 19,
                    kPkFlowUnrectify = 20;  // 18: a sweep, see flow.cuh

// What a sweep writes for the host, one row a round.
struct PaikernFlowRecord {
  double mantissa;  // R = mantissa * 2**top
  long long top;
  long long dead;            // first weight step that no path gets past, or -1
  long long broken;          // first weight step, forwards and then backwards, whose values are not finite, or -1
  long long empty;           // first layer without a weight, or -1
  unsigned long long nodes;  // of a training step: that live, and as pk_dpai_update counts
  unsigned long long weights, kernels, faults;
};

struct PaikernTerm {
  const float *values;
  PaikernScale *scale;
  long long numel;
  float *to;
};

// One instruction: a row of eight-byte numbers, of which each kind reads its own.
struct PaikernFlowStep {
  long long kind;
  float *out;
  long long numel;           // of out
  PaikernScale *scale;       // of out
  const PaikernScale *from;  // whose exponent out gets, or null
  const PaikernTerm *terms;
  long long term_count, first_term, last_term;  // join adds the terms from the first up to before the last
  long long outer, channels, inner;
  const float *factor;    // of each channel, null for 1
  const float *offset;    // of each channel, without a power of two; null for 0
  const long long *pool;  // planes, then size, out, kernel, stride, padding, dilation, two each
  int *places;            // of maxima
  void *data;
  long long *round;
  PaikernFlowRecord *record;  // of the round at hand, and behind it one for each round
  long long counts;           // 1: whole numbers, whose being 0 or not must not depend on rounding
  long long average;
  PaikernProduct product;
};

PK_DEVICE double pk_double_power(long long by) { return by < -1000 ? 0.0 : __longlong_as_double((by + 1023) << 52); }

// Elements of an instruction that fall to a thread.
#define PK_EACH(i, count) \
  for (long long i = block * kPkThreads + static_cast<long long>(threadIdx.x); i < (count); i += blocks * kPkThreads)

PK_DEVICE void pk_flow_fill(const PaikernFlowStep &step, long long block, long long blocks) {
  PK_EACH(i, step.numel) step.out[i] = step.factor == nullptr ? 1.0f : step.factor[i];
}

// Terms of which others take no part in the sum still take part in the power of two: what is handed to one operation
// has one. `average`: values do not sink below the floor when they are shifted.
PK_DEVICE void pk_flow_join(const PaikernFlowStep &step, long long block, long long blocks) {
  long long top = -0x7fffffffffffffffll;
  for (long long t = 0; t < step.term_count; ++t) {
    const long long exponent = pk_exponent_of(*step.terms[t].scale);
    top = exponent > top ? exponent : top;
  }
  if (block == 0 && threadIdx.x == 0) *step.scale = {0, top};
  PK_EACH(i, step.numel) {
    float sum = 0.0f;
    for (long long t = step.first_term; t < step.last_term; ++t) {
      const PaikernTerm &term = step.terms[t];
      const PaikernReader reader = pk_reader(term.scale, step.counts != 0);
      const long long by = pk_exponent_of(*term.scale) - top;
      const PaikernReader shift = {pk_power_of_two(by), by != 0 && step.average != 0 ? kPkCountFloor : 0.0f};
      const float value = pk_read(shift, pk_read(reader, term.values[i]));
      sum = t == step.first_term ? value : __fadd_rn(sum, value);
    }
    step.out[i] = sum;
  }
}

PK_DEVICE void pk_flow_normalise(const PaikernFlowStep &step, long long block, long long blocks) {
  for (long long t = 0; t < step.term_count; ++t) {
    const PaikernTerm &term = step.terms[t];
    if (term.scale->top == 0) continue;
    const PaikernReader reader = pk_reader(term.scale, step.counts != 0);
    PK_EACH(i, term.numel) term.to[i] = pk_read(reader, term.values[i]);
  }
}

PK_DEVICE void pk_flow_scale(const PaikernFlowStep &step, long long block, long long blocks) {
  const PaikernReader reader = pk_reader(step.terms[0].scale, step.counts != 0);
  const float *x = step.terms[0].values;
  const float power = step.offset == nullptr ? 0.0f : pk_power_of_two(-pk_exponent_of(*step.terms[0].scale));
  PK_EACH(i, step.numel) {
    float value = pk_read(reader, x[i]);
    const long long channel = i / step.inner % step.channels;
    if (step.factor != nullptr) value = __fmul_rn(value, step.factor[channel]);
    if (step.offset != nullptr) value = __fadd_rn(value, __fmul_rn(step.offset[channel], power));
    step.out[i] = value;
  }
}

PK_DEVICE void pk_flow_rectify(const PaikernFlowStep &step, long long block, long long blocks) {
  const PaikernReader reader = pk_reader(step.terms[0].scale, step.counts != 0);
  PK_EACH(i, step.numel) {
    const float value = pk_read(reader, step.terms[0].values[i]);
    step.out[i] = value < 0.0f ? 0.0f : value;  // NaN stays
  }
}

// Terms are what arrives from behind, and the rectified map.
PK_DEVICE void pk_flow_unrectify(const PaikernFlowStep &step, long long block, long long blocks) {
  const PaikernReader reader = pk_reader(step.terms[0].scale, step.counts != 0);
  PK_EACH(i, step.numel) {
    step.out[i] = step.terms[1].values[i] > 0.0f ? pk_read(reader, step.terms[0].values[i]) : 0.0f;
  }
}

PK_DEVICE void pk_flow_mean(const PaikernFlowStep &step, long long block, long long blocks) {
  const PaikernReader reader = pk_reader(step.terms[0].scale, step.counts != 0);
  const double divisor = step.average != 0 ? static_cast<double>(step.channels) : 1.0;
  PK_EACH(i, step.numel) {
    const long long outer = i / step.inner;
    const float *x = step.terms[0].values + (outer * step.channels) * step.inner + (i - outer * step.inner);
    double sum = 0.0;
    for (long long c = 0; c < step.channels; ++c, x += step.inner) sum += static_cast<double>(pk_read(reader, *x));
    step.out[i] = static_cast<float>(sum / divisor);
  }
}

PK_DEVICE void pk_flow_spread(const PaikernFlowStep &step, long long block, long long blocks) {
  const PaikernReader reader = pk_reader(step.terms[0].scale, step.counts != 0);
  const float divisor = step.average != 0 ? static_cast<float>(step.channels) : 1.0f;
  const long long each = step.channels * step.inner;
  PK_EACH(i, step.numel) {
    const float g = step.terms[0].values[i / each * step.inner + i % step.inner];
    step.out[i] = __fdiv_rn(pk_read(reader, g), divisor);
  }
}

// The first maximum of a window in row-major order.
PK_DEVICE void pk_flow_pool(const PaikernFlowStep &step, long long block, long long blocks) {
  const long long *p = step.pool;
  const PaikernReader reader = pk_reader(step.terms[0].scale, step.counts != 0);
  const long long windows = p[3] * p[4], pixels = p[1] * p[2];
  PK_EACH(i, step.numel) {
    const long long plane = i / windows, window = i - plane * windows;
    const float *x = step.terms[0].values + plane * pixels;
    const long long h0 = window / p[4] * p[7] - p[9], w0 = window % p[4] * p[8] - p[10];
    float best = 0.0f;
    long long where = -1;
    for (long long a = 0; a < p[5]; ++a) {
      const long long h = h0 + a * p[11];
      if (h < 0 || h >= p[1]) continue;
      for (long long b = 0; b < p[6]; ++b) {
        const long long w = w0 + b * p[12];
        if (w < 0 || w >= p[2]) continue;
        const float value = x[h * p[2] + w];
        if (where < 0 || value > best || value != value) {
          best = value;
          where = h * p[2] + w;
        }
      }
    }
    step.out[i] = pk_read(reader, best);
    step.places[i] = static_cast<int>(where);
  }
}

// Every place looks at the windows that it may be the maximum of, in their order.
PK_DEVICE void pk_flow_unpool(const PaikernFlowStep &step, long long block, long long blocks) {
  const long long *p = step.pool;
  const PaikernReader reader = pk_reader(step.terms[0].scale, step.counts != 0);
  const long long windows = p[3] * p[4], pixels = p[1] * p[2];
  const auto first = [&](long long at, int axis) {
    const long long reach = at + p[9 + axis] - (p[5 + axis] - 1) * p[11 + axis];
    return reach <= 0 ? 0 : (reach + p[7 + axis] - 1) / p[7 + axis];
  };
  const auto last = [&](long long at, int axis) {
    const long long reach = (at + p[9 + axis]) / p[7 + axis];
    return reach < p[3 + axis] - 1 ? reach : p[3 + axis] - 1;
  };
  PK_EACH(i, step.numel) {
    const long long plane = i / pixels, pixel = i - plane * pixels, h = pixel / p[2], w = pixel - h * p[2];
    const float *g = step.terms[0].values + plane * windows;
    const int *places = step.places + plane * windows;
    float sum = 0.0f;
    for (long long a = first(h, 0), end = last(h, 0); a <= end; ++a) {
      for (long long b = first(w, 1), stop = last(w, 1); b <= stop; ++b) {
        const long long window = a * p[4] + b;
        if (places[window] == pixel) sum = __fadd_rn(sum, pk_read(reader, g[window]));
      }
    }
    step.out[i] = sum;
  }
}

// The lowest layer whose mask has no bit goes to *data, which is -1 before: a layer is one block's.
PK_DEVICE void pk_flow_bits(const PaikernFlowStep &step, long long block, long long blocks) {
  for (long long t = block; t < step.term_count; t += blocks) {
    const unsigned char *bits = reinterpret_cast<const unsigned char *>(step.terms[t].values);
    int any = 0;
    for (long long i = threadIdx.x; i < step.terms[t].numel && any == 0; i += kPkThreads) any = bits[i];
    if (__syncthreads_or(any) != 0) continue;
    // As unsigned, -1 is above every layer.
    if (threadIdx.x == 0) atomicMin(static_cast<unsigned long long *>(step.data), static_cast<unsigned long long>(t));
  }
}

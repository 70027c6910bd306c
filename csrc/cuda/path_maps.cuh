// Products with maps: convolutions of up to three axes and batches of vectors, V * x, V^T * g, and scores.
//
//   C[m, n] = sum over k of A(m, k) * B(k, n)          m                n                   k
//   forward  A = V[o, (c, t)], B = x under tap t        rows             samples, positions  channels, taps
//   adjoint  A = V[o, (c, t)], B = g that tap t wrote   channels         samples, positions  rows, taps of a phase
//   score    A = g,            B = x under tap t        rows             channels, taps      samples, positions
//
// Groups are products of their own; so are, in the adjoint, the positions of one phase of the strides, which see the
// same taps. A block makes a tile of 64 x 64 (64 x 16 where n is at most 16), sixteen k at a time through shared
// memory, the next sixteen on their way meanwhile; 4 x 4 sums a thread. Where an element lies is a sum of what k and
// what m or n add to an address and to three coordinates: sixteen threads work that out for k, everybody once for n.
//
// Few tiles are cut along k into equal parts, whose sums the last block to arrive adds one after the other, many in
// sets. Every sum has one order, which follows from the shape: k ascending within a part, part after part.
//
// Bytes moved: the weight once for every 64 n, the maps once for every 64 m and every tap, most of it out of the
// caches. Limits: fp32 multiply-adds (no tensor cores: counts need fp32), and for few n the reads of the weight; groups
// of less than 64 rows leave lanes idle. Not yet measured on a GPU.
#pragma once

#include "path_vector.cuh"

enum PaikernWay { kPkForward, kPkAdjoint, kPkScore };

constexpr int kPkHigh = 64;    // m of a tile
constexpr int kPkDepth = 16;   // k at a time
constexpr int kPkPitch = 68;   // floats of a k in shared memory
constexpr int kPkNarrow = 16;  // n up to which tiles are narrow
constexpr long long kPkTiles = 264;
constexpr long long kPkLeast = 8;  // steps of a part
constexpr int kPkNowhere = -(1 << 30);

PK_DEVICE PaikernMaps pk_maps(const long long *geometry) {
  PaikernMaps maps;
  maps.batch = static_cast<int>(geometry[0]);
  maps.groups = static_cast<int>(geometry[3]);
  maps.rows = static_cast<int>(geometry[1]) / maps.groups;
  maps.channels = static_cast<int>(geometry[2]) / maps.groups;
  maps.pixels = maps.positions = maps.taps = 1;
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    maps.size[d] = static_cast<int>(geometry[4 + d]);
    maps.kernel[d] = static_cast<int>(geometry[7 + d]);
    maps.stride[d] = static_cast<int>(geometry[10 + d]);
    maps.padding[d] = static_cast<int>(geometry[13 + d]);
    maps.dilation[d] = static_cast<int>(geometry[16 + d]);
    maps.out[d] = static_cast<int>(geometry[19 + d]);
    maps.pixels *= maps.size[d];
    maps.positions *= maps.out[d];
    maps.taps *= maps.kernel[d];
  }
  return maps;
}

PK_DEVICE int pk_gcd(int a, int b) {
  while (b != 0) {
    const int rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

PK_DEVICE PaikernPhase pk_phase(const PaikernMaps &maps, int number) {
  PaikernPhase phase;
#pragma unroll
  for (int d = 2; d >= 0; --d) {
    const int stride = maps.stride[d];
    phase.at[d] = number % stride;
    number /= stride;
    phase.step[d] = stride / pk_gcd(stride, maps.dilation[d]);
    int first = 0;
    while (first < phase.step[d] && (phase.at[d] + maps.padding[d] - first * maps.dilation[d]) % stride != 0) ++first;
    phase.first[d] = first;
    const int left = first < phase.step[d] ? maps.kernel[d] - first : 0;
    phase.count[d] = left > 0 ? (left + phase.step[d] - 1) / phase.step[d] : 0;
  }
  return phase;
}

// Index i of a box, as its three coordinates.
PK_DEVICE void pk_coordinates(int i, const int (&box)[3], int (&at)[3]) {
  const int line = i / box[2];
  at[2] = i - line * box[2];
  at[0] = line / box[1];
  at[1] = line - at[0] * box[1];
}

PK_DEVICE long long pk_linear(const int (&at)[3], const int (&box)[3]) {
  return (static_cast<long long>(at[0]) * box[1] + at[1]) * box[2] + at[2];
}

template <int kWay, int kWide>
PK_DEVICE PaikernPlan pk_plan(const PaikernMaps &maps) {
  PaikernPlan plan;
  long long deep;
  plan.phases = 1;
  plan.box[0] = plan.box[1] = plan.box[2] = 1;
  if (kWay == kPkForward) {
    plan.m = maps.rows, plan.n = maps.batch * maps.positions, deep = static_cast<long long>(maps.channels) * maps.taps;
  } else if (kWay == kPkScore) {
    plan.m = maps.rows, plan.n = maps.channels * maps.taps, deep = static_cast<long long>(maps.batch) * maps.positions;
  } else {
    int taps = 1;
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      const int step = maps.stride[d] / pk_gcd(maps.stride[d], maps.dilation[d]);
      taps *= (maps.kernel[d] + step - 1) / step;
      plan.box[d] = (maps.size[d] + maps.stride[d] - 1) / maps.stride[d];
      plan.phases *= maps.stride[d];
    }
    plan.m = maps.channels, plan.n = maps.batch * plan.box[0] * plan.box[1] * plan.box[2];
    deep = static_cast<long long>(maps.rows) * taps;
  }
  plan.high = pk_ceil(plan.m, kPkHigh);
  plan.wide = pk_ceil(plan.n, kWide);
  plan.tiles = plan.high * plan.wide * plan.phases * maps.groups;
  plan.cut = pk_cut(pk_ceil(deep, kPkDepth), plan.tiles, kPkTiles, kPkLeast);
  return plan;
}

PK_DEVICE bool pk_narrow(const PaikernMaps &maps, int way) {
  if (way == kPkScore) return maps.channels * maps.taps <= kPkNarrow;
  if (way == kPkForward) return maps.batch * maps.positions <= kPkNarrow;
  int box = maps.batch;
#pragma unroll
  for (int d = 0; d < 3; ++d) box *= (maps.size[d] + maps.stride[d] - 1) / maps.stride[d];
  return box <= kPkNarrow;
}

// What k adds.
template <int kWay>
PK_DEVICE PaikernEntry pk_entry_of_k(const PaikernMaps &maps, const PaikernPhase &phase, int k, int end) {
  if (k >= end) return {0, 0, kPkNowhere, 0, 0, 0};
  int at[3];
  if (kWay == kPkForward) {
    const int channel = k / maps.taps;
    pk_coordinates(k - channel * maps.taps, maps.kernel, at);
#pragma unroll
    for (int d = 0; d < 3; ++d) at[d] *= maps.dilation[d];
    return {k, static_cast<long long>(channel) * maps.pixels + pk_linear(at, maps.size), at[0], at[1], at[2], 0};
  }
  if (kWay == kPkScore) {
    const int sample = k / maps.positions, position = k - sample * maps.positions;
    pk_coordinates(position, maps.out, at);
#pragma unroll
    for (int d = 0; d < 3; ++d) at[d] = at[d] * maps.stride[d] - maps.padding[d];
    const long long wide = static_cast<long long>(sample) * maps.groups;
    return {wide * maps.rows * maps.positions + position,
            wide * maps.channels * maps.pixels + pk_linear(at, maps.size),
            at[0],
            at[1],
            at[2],
            0};
  }
  const int hits = phase.count[0] * phase.count[1] * phase.count[2], row = k / hits;
  pk_coordinates(k - row * hits, phase.count, at);
#pragma unroll
  for (int d = 0; d < 3; ++d) at[d] = phase.first[d] + at[d] * phase.step[d];
  const long long tap = pk_linear(at, maps.kernel);
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    at[d] = (phase.at[d] + maps.padding[d] - at[d] * maps.dilation[d]) / maps.stride[d];  // divides exactly
  }
  return {static_cast<long long>(row) * maps.channels * maps.taps + tap,
          static_cast<long long>(row) * maps.positions + pk_linear(at, maps.out),
          at[0],
          at[1],
          at[2],
          0};
}

// What n adds to B (b) and to the result (a; -1: n is none of its elements).
template <int kWay>
PK_DEVICE PaikernEntry pk_entry_of_n(const PaikernMaps &maps, const PaikernPlan &plan, const PaikernPhase &phase,
                                     int n) {
  if (n >= plan.n) return {-1, 0, kPkNowhere, 0, 0, 0};
  int at[3];
  if (kWay == kPkScore) {
    const int channel = n / maps.taps;
    pk_coordinates(n - channel * maps.taps, maps.kernel, at);
#pragma unroll
    for (int d = 0; d < 3; ++d) at[d] *= maps.dilation[d];
    return {n, static_cast<long long>(channel) * maps.pixels + pk_linear(at, maps.size), at[0], at[1], at[2], 0};
  }
  const int each = kWay == kPkForward ? maps.positions : plan.box[0] * plan.box[1] * plan.box[2];
  const int sample = n / each, position = n - sample * each;
  const long long x = static_cast<long long>(sample) * maps.groups * maps.channels * maps.pixels;
  const long long g = static_cast<long long>(sample) * maps.groups * maps.rows * maps.positions;
  if (kWay == kPkForward) {
    pk_coordinates(position, maps.out, at);
#pragma unroll
    for (int d = 0; d < 3; ++d) at[d] = at[d] * maps.stride[d] - maps.padding[d];
    return {g + position, x + pk_linear(at, maps.size), at[0], at[1], at[2], 0};
  }
  pk_coordinates(position, plan.box, at);
  int pixel[3];
  bool inside = true;
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    pixel[d] = at[d] * maps.stride[d] + phase.at[d];
    inside = inside && pixel[d] < maps.size[d];
  }
  if (!inside) return {-1, 0, kPkNowhere, 0, 0, 0};
  return {x + pk_linear(pixel, maps.size), g + pk_linear(at, maps.out), at[0], at[1], at[2], 0};
}

PK_DEVICE bool pk_inside(const PaikernEntry &one, const PaikernEntry &other, const int (&box)[3]) {
  // Unsigned: below zero is above the box.
  return static_cast<unsigned>(one.c0 + other.c0) < static_cast<unsigned>(box[0]) &&
         static_cast<unsigned>(one.c1 + other.c1) < static_cast<unsigned>(box[1]) &&
         static_cast<unsigned>(one.c2 + other.c2) < static_cast<unsigned>(box[2]);
}

// pruned and out: of scores.
template <int kWay, int kWide>
PK_DEVICE void pk_product(const PaikernProduct &p, float pruned, float *out, long long block, long long blocks) {
  constexpr bool kAlongK = kWay != kPkAdjoint;  // A lies in memory along k, else along m
  constexpr bool kBAlongK = kWay == kPkScore;
  constexpr int kMany = kWide / 16;  // B's elements, and columns of the result, of a thread
  PaikernScratch &scratch = pk_scratch();
  const PaikernMaps &maps = scratch.maps;
  const PaikernPlan &plan = scratch.plan;
  const PaikernPhase &phase = scratch.phase;
  __syncthreads();  // between functions: whoever had the scratch before
  if (pk_thread() == 0) {
    scratch.maps = pk_maps(p.geometry);
    scratch.plan = pk_plan<kWay, kWide>(maps);
  }
  __syncthreads();
  const PaikernReader x_reader = pk_reader(p.x_scale, p.counts != 0), g_reader = pk_reader(p.g_scale, p.counts != 0);
  const PaikernReader b_reader = kWay == kPkAdjoint ? g_reader : x_reader;
  const float *b_from = kWay == kPkAdjoint ? p.g : p.x;
  const int t = pk_thread(), tx = t % 16, ty = t / 16;
  unsigned top = 0;
  for (long long item = block; item < plan.tiles * plan.cut.parts; item += blocks) {
    const long long tile = item / plan.cut.parts, part = item - tile * plan.cut.parts;
    const long long strip = tile / plan.wide, rest = strip / plan.high;
    const int first_n = static_cast<int>(tile - strip * plan.wide) * kWide;
    const int first_m = static_cast<int>(strip - rest * plan.high) * kPkHigh;
    const int group = static_cast<int>(rest / plan.phases);
    __syncthreads();  // of the item before: all have done with the scratch
    if (kWay == kPkAdjoint) {
      if (t == 0) scratch.phase = pk_phase(maps, static_cast<int>(rest - static_cast<long long>(group) * plan.phases));
      __syncthreads();
    }
    const int deep = kWay == kPkForward ? maps.channels * maps.taps
                     : kWay == kPkScore ? maps.batch * maps.positions
                                        : maps.rows * phase.count[0] * phase.count[1] * phase.count[2];
    const long long from = part * plan.cut.steps * kPkDepth, until = from + plan.cut.steps * kPkDepth;
    const int begin = static_cast<int>(pk_least(from, deep)), end = static_cast<int>(pk_least(until, deep));
    const int steps = (end - begin + kPkDepth - 1) / kPkDepth;
    const long long weights = static_cast<long long>(group) * maps.rows * maps.channels * maps.taps;
    const long long x_base = static_cast<long long>(group) * maps.channels * maps.pixels;
    const long long g_base = static_cast<long long>(group) * maps.rows * maps.positions;
    const long long a_base = kWay == kPkScore ? g_base : weights;
    const long long b_base = kWay == kPkAdjoint ? g_base : x_base;
    const long long a_pitch = kWay == kPkForward ? static_cast<long long>(maps.channels) * maps.taps
                              : kWay == kPkScore ? maps.positions
                                                 : maps.taps;
    // Of A: four elements, k and m; of B: kMany.
    const int a_k = kAlongK ? tx : t / 64, a_k_step = kAlongK ? 0 : 4;
    const int a_m = kAlongK ? ty : t % 64, a_m_step = kAlongK ? 16 : 0;
    const int b_k = kBAlongK ? tx : t / kWide, b_k_step = kBAlongK ? 0 : kPkBlock / kWide;
    const int b_n = kBAlongK ? ty : t % kWide, b_n_step = kBAlongK ? 16 : 0;
    PaikernEntry of_n[kBAlongK ? kMany : 1];
#pragma unroll
    for (int i = 0; i < (kBAlongK ? kMany : 1); ++i) {
      of_n[i] = pk_entry_of_n<kWay>(maps, plan, phase, first_n + b_n + i * b_n_step);
    }
    PaikernStored a_stored[4];
    float b_stored[kMany];
    const auto fetch = [&](int step) {
      const PaikernEntry *entries = scratch.entries[step & 1];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const PaikernEntry &of_k = entries[a_k + i * a_k_step];
        const int m = first_m + a_m + i * a_m_step;
        a_stored[i] = {0, false};
        if (m >= plan.m || of_k.c0 == kPkNowhere) continue;
        const long long at = a_base + m * a_pitch + of_k.a;
        if (kWay == kPkScore) {
          a_stored[i] = {__float_as_uint(p.g[at]), true};
        } else {
          a_stored[i] = pk_stored(p, at);
        }
      }
#pragma unroll
      for (int i = 0; i < kMany; ++i) {
        const PaikernEntry &of_k = entries[b_k + i * b_k_step];
        const PaikernEntry &n = of_n[kBAlongK ? i : 0];
        b_stored[i] =
            pk_inside(of_k, n, kWay == kPkAdjoint ? maps.out : maps.size) ? b_from[b_base + of_k.b + n.b] : 0.0f;
      }
    };
    const auto store = [&](int step) {
      float *a = scratch.a[step & 1], *b = scratch.b[step & 1];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float value = kWay == kPkScore
                                ? (a_stored[i].kept ? pk_read(g_reader, __uint_as_float(a_stored[i].raw)) : 0.0f)
                                : pk_made(p, a_stored[i]);
        a[(a_k + i * a_k_step) * kPkPitch + a_m + i * a_m_step] = value;
      }
#pragma unroll
      for (int i = 0; i < kMany; ++i) {
        b[(b_k + i * b_k_step) * kPkPitch + b_n + i * b_n_step] = pk_read(b_reader, b_stored[i]);
      }
    };
    float sums[4][kMany] = {};
    if (t < 32) scratch.entries[t / 16][tx] = pk_entry_of_k<kWay>(maps, phase, begin + t, end);
    __syncthreads();
    if (steps > 0) {
      fetch(0);
      store(0);
    }
    for (int step = 0; step < steps; ++step) {
      __syncthreads();
      if (step + 1 < steps) fetch(step + 1);
      if (t < 16)
        scratch.entries[step & 1][t] = pk_entry_of_k<kWay>(maps, phase, begin + (step + 2) * kPkDepth + t, end);
      const float *a = scratch.a[step & 1] + 4 * ty, *b = scratch.b[step & 1] + kMany * tx;
#pragma unroll
      for (int k = 0; k < kPkDepth; ++k, a += kPkPitch, b += kPkPitch) {
        const float4 four = *reinterpret_cast<const float4 *>(a);
        const float left[4] = {four.x, four.y, four.z, four.w};
        float right[kMany];
        if (kMany == 4) {
          const float4 other = *reinterpret_cast<const float4 *>(b);
          right[0] = other.x, right[1 % kMany] = other.y, right[2 % kMany] = other.z, right[3 % kMany] = other.w;
        } else {
          right[0] = b[0];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < kMany; ++j) sums[i][j] = __fmaf_rn(left[i], right[j], sums[i][j]);
        }
      }
      if (step + 1 < steps) store(step + 1);
    }
    if (plan.cut.parts > 1) {
      constexpr long long kTile = kPkHigh * kWide;
      float *own = p.partial + tile * plan.cut.parts * kTile + t;
      const auto add = [&](long long first, long long count, long long apart) {
#pragma unroll
        for (int i = 0; i < 4 * kMany; ++i) sums[i / kMany][i % kMany] = own[first * kTile + i * kPkBlock];
        for (long long other = 1; other < count; ++other) {
          const float *from = own + (first + other * apart) * kTile;
#pragma unroll
          for (int i = 0; i < 4 * kMany; ++i) {
            sums[i / kMany][i % kMany] = __fadd_rn(sums[i / kMany][i % kMany], from[i * kPkBlock]);
          }
        }
      };
      const auto keep = [&](long long to) {
#pragma unroll
        for (int i = 0; i < 4 * kMany; ++i) own[to * kTile + i * kPkBlock] = sums[i / kMany][i % kMany];
      };
      keep(part);
      if (!pk_join(p.arrived + tile * pk_counters(plan.cut.parts), plan.cut.parts, part, add, keep)) continue;
    }
#pragma unroll
    for (int j = 0; j < kMany; ++j) {
      const long long to = pk_entry_of_n<kWay>(maps, plan, phase, first_n + kMany * tx + j).a;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = first_m + 4 * ty + i;
        if (to < 0 || m >= plan.m) continue;
        const float sum = sums[i][j];
        if (kWay == kPkForward) p.g[g_base + static_cast<long long>(m) * maps.positions + to] = sum;
        if (kWay == kPkAdjoint) p.x[x_base + static_cast<long long>(m) * maps.pixels + to] = sum;
        if (kWay == kPkScore) {
          const long long at = weights + static_cast<long long>(m) * plan.n + to;
          const PaikernStored stored = pk_stored(p, at);
          out[at] = stored.kept ? __fmul_rn(pk_made(p, stored), sum) : pruned;
        } else {
          pk_note(&top, sum);
        }
      }
    }
  }
  pk_raise_top(p.top, __uint_as_float(top));
}

template <int kWay>
PK_DEVICE void pk_product_of_maps(const PaikernProduct &p, float pruned, float *out, long long block,
                                  long long blocks) {
  if (pk_narrow(pk_maps(p.geometry), kWay)) {
    pk_product<kWay, 16>(p, pruned, out, block, blocks);
  } else {
    pk_product<kWay, 64>(p, pruned, out, block, blocks);
  }
}

// --- whatever the shape ---------------------------------------------------------------------------------------------

// g = V x.
PK_DEVICE void pk_path_forward(const PaikernProduct &p, long long block, long long blocks) {
  if (pk_one_vector(p.geometry)) return pk_forward_vector(p, block, blocks);
  pk_product_of_maps<kPkForward>(p, 0.0f, nullptr, block, blocks);
}

// x = V^T g.
PK_DEVICE void pk_path_adjoint(const PaikernProduct &p, long long block, long long blocks) {
  if (pk_one_vector(p.geometry)) return pk_adjoint_vector(p, block, blocks);
  pk_product_of_maps<kPkAdjoint>(p, 0.0f, nullptr, block, blocks);
}

// out, of the shape of the weight: V times the sum of g * x, `pruned` where the mask has a 0 bit.
PK_DEVICE void pk_path_score(const PaikernProduct &p, float pruned, float *out, long long block, long long blocks) {
  if (pk_one_vector(p.geometry)) return pk_score_vector(p, pruned, out, block, blocks);
  pk_product_of_maps<kPkScore>(p, pruned, out, block, blocks);
}

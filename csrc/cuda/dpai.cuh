// One DPaI update of the scores of a layer, s [rows, columns, taps] (specification: paikern/ops/dpai_step.py).
//
//   q = q_scale * q, where for vectors q = g[o] * x[i] is never stored
//   f = any kept weight of the kernel (o, i) with q != 0
//   u = 1 where the node is not live, 1 - alpha where f, else (1 - alpha) + alpha * beta
//   a = u * sign(s) * q;  ascent: s += step * a;  Adam: a step on the gradient -a
//
// The q of maps is made by pk_path_score (power 0, no mask) into room of one layer; f needs all taps of a kernel, and
// tiles of products cut kernels. Here a block has 1024 weights at a time, in whole kernels: what is loaded of a weight
// is on its way while flags are made, the bits of a tile are 32 words in shared memory. Kernels of more than 1024
// weights have a block each and read q and the mask twice.
//
// Bytes moved a weight: 8 for ascent, 24 with Adam (s, m, v read and written), 1/8 for the mask, 4 more for the q of
// maps besides its making. Limit: memory bandwidth. Arithmetic is that of csrc/cpu/dpai_row.inc.h term for term: given
// the same q, s has the same bits. What changes from step to step is read from device memory, so that a captured loop
// needs no new arguments. Counts are integers, whose order does not matter. Not yet measured on a GPU.
#pragma once

#include "path_vector.cuh"

struct PaikernDpaiRule {
  float kernel_dead, effective;
  float step;                           // ascent: eta; Adam: lr / (1 - beta1**t)
  float beta1, beta2, inverse_root_c2;  // inverse_root_c2 = 1 / sqrt(1 - beta2**t)
  float epsilon, unused;
};

// A row of eight-byte numbers, or made from the arguments of a kernel.
struct PaikernDpai {
  float *s, *m, *v;           // m, v null: ascent
  const unsigned char *mask;  // packed
  long long first_bit;
  const float *q;  // of the shape of s; null: from x and g, one tap
  const float *x, *g;
  const PaikernScale *x_scale, *g_scale;
  const unsigned char *live;    // a byte a node: a row, or with `transposed` a column of each group
  const PaikernDpaiRule *rule;  // in device memory, as is
  const float *q_scale;
  unsigned long long *found;  // raised by kept weights with q != 0, their kernels, and scores that are not finite now
  long long rows, columns, taps, groups;
  long long transposed;
  long long counts;  // see pk_reader
};

PK_DEVICE float pk_dpai_ascent(float s, float q, float u) {
  const float directed = __uint_as_float(__float_as_uint(q) ^ (__float_as_uint(s) & 0x80000000u));
  return __fmul_rn(u, s != 0.0f ? directed : 0.0f);
}

// The score after a step; m and v of Adam with it.
PK_DEVICE float pk_dpai_next(const PaikernDpaiRule &rule, bool adam, float s, float ascent, float *m, float *v) {
  if (!adam) return __fmaf_rn(rule.step, ascent, s);
  const float gradient = __fsub_rn(0.0f, ascent);
  *m = __fmaf_rn(__fsub_rn(1.0f, rule.beta1), gradient, __fmul_rn(rule.beta1, *m));
  *v = __fmaf_rn(__fmul_rn(__fsub_rn(1.0f, rule.beta2), gradient), gradient, __fmul_rn(rule.beta2, *v));
  const float root = __fmaf_rn(__fsqrt_rn(*v), rule.inverse_root_c2, rule.epsilon);
  return __fsub_rn(s, __fdiv_rn(__fmul_rn(rule.step, *m), root));
}

PK_DEVICE bool pk_dpai_live(const PaikernDpai &d, long long row, unsigned column) {
  if (d.transposed == 0) return d.live[row] != 0;
  const unsigned high = static_cast<unsigned>(d.rows / d.groups);
  return d.live[static_cast<unsigned>(row) / high * d.columns + column] != 0;
}

PK_DEVICE bool pk_dpai_kept(const PaikernDpai &d, long long i) {
  const long long bit = d.first_bit + i;
  return ((d.mask[bit >> 3] >> (bit & 7)) & 1) != 0;
}

// Whether one of the bits from .. from + count is set.
PK_DEVICE bool pk_any_bit(const unsigned *words, unsigned from, unsigned count) {
  const unsigned end = from + count;
  for (unsigned i = from / 32; i * 32 < end; ++i) {
    unsigned word = words[i];
    if (i * 32 < from) word &= 0xffffffffu << (from % 32);
    if (end < i * 32 + 32) word &= (1u << (end % 32)) - 1u;
    if (word != 0) return true;
  }
  return false;
}

// The running counts of a thread.
struct PaikernDpaiCounts {
  unsigned weights, kernels, broken;
};

PK_DEVICE void pk_dpai_tell(const PaikernDpai &d, const PaikernDpaiCounts &counts) {
  const unsigned mine[3] = {counts.weights, counts.kernels, counts.broken};
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    unsigned sum = mine[i];
    for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
    if (threadIdx.x % 32 == 0 && sum != 0) atomicAdd(d.found + i, static_cast<unsigned long long>(sum));
  }
}

// Kernels of more than kPkFlat weights, one at a time.
PK_DEVICE void pk_dpai_large(const PaikernDpai &d, long long block, long long blocks) {
  const PaikernDpaiRule rule = *d.rule;
  const float scale = *d.q_scale;
  const bool adam = d.m != nullptr;
  PaikernDpaiCounts counts = {0, 0, 0};
  for (long long kernel = block; kernel < d.rows * d.columns; kernel += blocks) {
    const long long first = kernel * d.taps, row = kernel / d.columns;
    int any = 0;
    for (long long i = threadIdx.x; i < d.taps; i += kPkBlock) {
      const bool effective = pk_dpai_kept(d, first + i) && __fmul_rn(scale, d.q[first + i]) != 0.0f;
      counts.weights += effective;
      any |= effective;
    }
    any = __syncthreads_or(any);
    counts.kernels += any != 0 && threadIdx.x == 0;
    const bool live = pk_dpai_live(d, row, static_cast<unsigned>(kernel - row * d.columns));
    const float u = live ? (any ? rule.effective : rule.kernel_dead) : 1.0f;
    for (long long i = first + threadIdx.x; i < first + d.taps; i += kPkBlock) {
      float m = adam ? d.m[i] : 0.0f, v = adam ? d.v[i] : 0.0f;
      const float s = d.s[i];
      const float next = pk_dpai_next(rule, adam, s, pk_dpai_ascent(s, __fmul_rn(scale, d.q[i]), u), &m, &v);
      d.s[i] = next;
      if (adam) d.m[i] = m, d.v[i] = v;
      counts.broken += __fsub_rn(next, next) != 0.0f;  // infinity too: NaN is unequal to everything
    }
  }
  pk_dpai_tell(d, counts);
}

PK_DEVICE void pk_dpai_update(const PaikernDpai &d, long long block, long long blocks) {
  if (d.taps > kPkFlat) return pk_dpai_large(d, block, blocks);
  PaikernScratch &scratch = pk_scratch();
  unsigned *words = reinterpret_cast<unsigned *>(scratch.a[0]);  // 32: a bit a weight of the tile
  const PaikernDpaiRule rule = *d.rule;
  const float scale = *d.q_scale;
  const bool adam = d.m != nullptr;
  const PaikernReader x_reader = pk_reader(d.x_scale, d.counts != 0), g_reader = pk_reader(d.g_scale, d.counts != 0);
  const unsigned taps = static_cast<unsigned>(d.taps), each = kPkFlat / taps;  // kernels of a tile
  const long long kernels = d.rows * d.columns;
  PaikernDpaiCounts counts = {0, 0, 0};
  for (long long kernel = block * each; kernel < kernels; kernel += blocks * each) {
    const long long first = kernel * taps;
    const unsigned here = static_cast<unsigned>(pk_least(each, kernels - kernel)) * taps;
    const PaikernPlace place = pk_place(kernel, d.columns);
    float q[4], s[4], m[4], v[4];
    bool effective[4];
    __syncthreads();  // the words of the tile before have been read
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned at = static_cast<unsigned>(i) * kPkBlock + threadIdx.x;
      q[i] = s[i] = m[i] = v[i] = 0.0f;
      effective[i] = false;
      if (at < here) {
        if (d.q != nullptr) {
          q[i] = d.q[first + at];
        } else {
          q[i] =
              __fmul_rn(pk_read(g_reader, d.g[pk_row_of(place, at)]), pk_read(x_reader, d.x[pk_column_of(place, at)]));
        }
        s[i] = d.s[first + at];
        if (adam) m[i] = d.m[first + at], v[i] = d.v[first + at];
        effective[i] = pk_dpai_kept(d, first + at);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      q[i] = __fmul_rn(scale, q[i]);
      effective[i] = effective[i] && q[i] != 0.0f;
      counts.weights += effective[i];
      const unsigned word = __ballot_sync(0xffffffffu, effective[i]);
      if (threadIdx.x % 32 == 0) words[i * (kPkBlock / 32) + threadIdx.x / 32] = word;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned at = static_cast<unsigned>(i) * kPkBlock + threadIdx.x;
      if (at >= here) continue;
      const unsigned own = at / taps;
      const bool flag = taps == 1 ? effective[i] : pk_any_bit(words, own * taps, taps);
      counts.kernels += flag && at == own * taps;
      const bool live = pk_dpai_live(d, pk_row_of(place, own), pk_column_of(place, own));
      const float u = live ? (flag ? rule.effective : rule.kernel_dead) : 1.0f;
      const float next = pk_dpai_next(rule, adam, s[i], pk_dpai_ascent(s[i], q[i], u), &m[i], &v[i]);
      d.s[first + at] = next;
      if (adam) d.m[first + at] = m[i], d.v[first + at] = v[i];
      counts.broken += __fsub_rn(next, next) != 0.0f;  // infinity too: NaN is unequal to everything
    }
  }
  pk_dpai_tell(d, counts);
}

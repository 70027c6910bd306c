// masked_linear_kept by index: out[i] = sum over n of g[n, r] * x[n, c] for every kept entry (r, c), nothing elsewhere.
//
//   dots  g and x in panels (paikern_masked_panels); a warp has a row of V or a part of it, its g in registers, and
//   goes
//         along the entries, eight at a time: a lane multiplies `wide` rows of the batch, and the eight sums of 32
//         lanes are added pairwise with nine shuffles
//   few   up to eight rows of the batch: a lane has an entry and reads x where it is
//
// Bytes moved: 32 * wide values of x from L2 for each entry and panel, which is the limit; 2 read and the type's
// written a kept weight. A sum is over a lane's rows of the batch, panel after panel, then over the lanes. Not yet
// measured on a GPU.
#pragma once

#include "masked.cuh"

constexpr int kPkDots = 8;  // entries of a warp at once

template <int kType, int kWide>
PK_DEVICE void pk_packed_dots(const PaikernPacked &v, const void *g, const void *x, long long panels, long long parts,
                              void *out) {
  constexpr int kWidth = 32 * kWide;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const long long groups = (v.rows + kPkPackedWarps - 1) / kPkPackedWarps, part = blockIdx.x / groups;
  const long long row = (blockIdx.x - part * groups) * kPkPackedWarps + warp;
  if (row >= v.rows) return;  // with its whole warp
  const PaikernEntries entries = pk_packed_part(v, row, part, parts, kPkDots);
  pk_packed_groups(v, row, entries, [&](long long base, int first, int last) {
    for (int i = first; i < last; i += kPkDots) {
      const int mine = i + lane % kPkDots, own = mine < last ? v.positions[mine] : 0;
      int at[kPkDots];
      float sums[kPkDots] = {};
#pragma unroll
      for (int u = 0; u < kPkDots; ++u) at[u] = __shfl_sync(0xffffffffu, own, u) * kWidth;
      for (long long p = 0; p < panels; ++p) {
        float left[kWide], right[kPkDots][kWide];
        pk_packed_read<kType, kWide>(g, (p * v.rows + row) * kWidth + lane * kWide, left);
        const long long from = (p * v.columns + base) * kWidth + lane * kWide;
#pragma unroll
        for (int u = 0; u < kPkDots; ++u) {
#pragma unroll
          for (int k = 0; k < kWide; ++k) right[u][k] = 0.0f;
          if (i + u < last) pk_packed_read<kType, kWide>(x, from + at[u], right[u]);
        }
#pragma unroll
        for (int u = 0; u < kPkDots; ++u) {
#pragma unroll
          for (int k = 0; k < kWide; ++k) sums[u] = __fmaf_rn(left[k], right[u][k], sums[u]);
        }
      }
      // Half of the sums go to half of the lanes, three times: lane l then has the sum l / 4 of eight lanes.
#pragma unroll
      for (int half = kPkDots / 2, by = 16; half > 0; half /= 2, by /= 2) {
        const bool upper = (lane & by) != 0;
#pragma unroll
        for (int u = 0; u < half; ++u) {
          const float other = __shfl_xor_sync(0xffffffffu, upper ? sums[u] : sums[u + half], by);
          sums[u] = __fadd_rn(upper ? sums[u + half] : sums[u], other);
        }
      }
      float sum = sums[0];
      sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 2));
      sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 1));
      if (lane % 4 == 0 && i + lane / 4 < last) pk_store(out, kType, i + lane / 4, sum);
    }
  });
}

template <int kWide>
PK_DEVICE void pk_packed_dots_of(const PaikernPacked &v, long long type, const void *g, const void *x, long long panels,
                                 long long parts, void *out) {
  if (type == 0) return pk_packed_dots<0, kWide>(v, g, x, panels, parts, out);
  if (type == 1) return pk_packed_dots<1, kWide>(v, g, x, panels, parts, out);
  pk_packed_dots<2, kWide>(v, g, x, panels, parts, out);
}

// g: [panels, rows, width], x: [panels, columns, width], out: [kept], of one type; no values are read. Blocks: eight
// rows of a part each.
extern "C" __global__ void __launch_bounds__(256, 2)
    paikern_masked_dots_1(PK_PACKED_PARAMETERS, long long type, const void *g, const void *x, long long panels,
                          long long parts, void *out) {
  pk_packed_dots_of<1>(PK_PACKED, type, g, x, panels, parts, out);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    paikern_masked_dots_2(PK_PACKED_PARAMETERS, long long type, const void *g, const void *x, long long panels,
                          long long parts, void *out) {
  pk_packed_dots_of<2>(PK_PACKED, type, g, x, panels, parts, out);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    paikern_masked_dots_4(PK_PACKED_PARAMETERS, long long type, const void *g, const void *x, long long panels,
                          long long parts, void *out) {
  pk_packed_dots_of<4>(PK_PACKED, type, g, x, panels, parts, out);
}

// g: [batch, rows], x: [batch, columns]. Blocks as above.
extern "C" __global__ void __launch_bounds__(256, 2)
    paikern_masked_dots_few(PK_PACKED_PARAMETERS, long long type, const void *g, const void *x, long long batch,
                            long long parts, void *out) {
  const PaikernPacked v = PK_PACKED;
  const long long groups = (v.rows + kPkPackedWarps - 1) / kPkPackedWarps, part = blockIdx.x / groups;
  const long long row = (blockIdx.x - part * groups) * kPkPackedWarps + threadIdx.x / 32;
  if (row >= v.rows) return;
  pk_packed_groups(v, row, pk_packed_part(v, row, part, parts, 32), [&](long long base, int first, int last) {
    for (int i = first + static_cast<int>(threadIdx.x % 32); i < last; i += 32) {
      const long long column = base + v.positions[i];
      float sum = 0.0f;
      for (long long n = 0; n < batch; ++n) {
        sum = __fmaf_rn(pk_value(g, type, n * v.rows + row), pk_value(x, type, n * v.columns + column), sum);
      }
      pk_store(out, type, i, sum);
    }
  });
}

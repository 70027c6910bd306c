// masked_linear of up to four rows of x by bitmap: a warp has a row of V, or some panels of it; a lane has the column
// of its bit, and the value whose number is how many bits are set before. Bytes moved: 1/8 a weight and the type's a
// kept weight. Limit: instructions, some ten for 32 weights.
//
// A sum is that of the lanes, pairwise, each in the order of its columns; parts are added by paikern_masked_parts. Not
// yet measured on a GPU.
#pragma once

#include "masked_bits.cuh"

template <int kType, int kBatch>
PK_DEVICE void pk_packed_few_bits(const PaikernPacked &v, const unsigned char *mask, const void *x, int batch,
                                  const void *bias, long long parts, void *y) {
  const long long panels = pk_packed_panels(v), each = (panels + parts - 1) / parts;
  const long long item = static_cast<long long>(blockIdx.x) * kPkPackedWarps + threadIdx.x / 32;
  const long long part = item / v.rows, row = item - part * v.rows;
  if (part >= parts) return;  // with its whole warp
  const long long first = part * each * v.panel, end = first + each * v.panel;
  const long long last = end < v.columns ? end : v.columns;
  float sums[kBatch] = {};
  if (first < last) {
    pk_packed_bits(mask, row * v.columns + first, last - first, v.starts[row * panels + part * each],
                   [&](long long at, bool kept, int entry) {
                     if (!kept) return;
                     const float value = pk_value(v.values, kType, entry);
#pragma unroll
                     for (int n = 0; n < kBatch; ++n) {
                       if (n >= batch) continue;
                       sums[n] = __fmaf_rn(value, pk_value(x, kType, n * v.columns + first + at), sums[n]);
                     }
                   });
  }
#pragma unroll
  for (int n = 0; n < kBatch; ++n) {
    for (int by = 16; by > 0; by /= 2) sums[n] = __fadd_rn(sums[n], __shfl_xor_sync(0xffffffffu, sums[n], by));
    if (threadIdx.x % 32 == 0 && n < batch) {
      pk_packed_store(y, kType, bias, parts == 1, (part * batch + n) * v.rows + row, row, sums[n]);
    }
  }
}

template <int kType>
PK_DEVICE void pk_packed_few_bits_of(const PaikernPacked &v, const unsigned char *mask, const void *x, long long batch,
                                     const void *bias, long long parts, void *y) {
  const int some = static_cast<int>(batch);
  if (batch == 1) return pk_packed_few_bits<kType, 1>(v, mask, x, some, bias, parts, y);
  if (batch == 2) return pk_packed_few_bits<kType, 2>(v, mask, x, some, bias, parts, y);
  pk_packed_few_bits<kType, 4>(v, mask, x, some, bias, parts, y);
}

// As paikern_masked_few, with the packed mask in the place of the positions; a warp for each of parts * rows.
extern "C" __global__ void __launch_bounds__(256, 2)
    paikern_masked_few_bits(PK_PACKED_PARAMETERS, long long type, const unsigned char *mask, const void *x,
                            long long batch, const void *bias, long long parts, void *y) {
  const PaikernPacked v = PK_PACKED;
  if (type == 0) return pk_packed_few_bits_of<0>(v, mask, x, batch, bias, parts, y);
  if (type == 1) return pk_packed_few_bits_of<1>(v, mask, x, batch, bias, parts, y);
  pk_packed_few_bits_of<2>(v, mask, x, batch, bias, parts, y);
}

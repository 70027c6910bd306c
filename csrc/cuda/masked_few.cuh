// masked_linear of up to four rows of x by index: y[n, r] = sum over the entries of row r of V[r, c] * x[n, c] +
// bias[r].
//
// 4 to 32 lanes have a row, or a part of a long one, as many as it has entries for; a lane has eight neighbouring
// entries at a time, sixteen bytes of positions and sixteen or 32 of values. Bytes moved: 2 + the type's a kept weight
// (6 more through `source`, for the transposed weight); x comes from the caches. Limit: memory bandwidth, and below
// some hundred entries a row the latency of starts and entries, which follow from one another.
//
// A sum is that of the lanes, pairwise, each in the order of its entries; parts are added by paikern_masked_parts. Not
// yet measured on a GPU.
#pragma once

#include "masked.cuh"

constexpr int kPkEight = 8;  // entries of a lane

// Entries i .. i + 7, of which first .. last - 1 count; i is a multiple of eight. The others are zero.
template <int kType>
PK_DEVICE void pk_packed_eight(const PaikernPacked &v, bool even, int i, int first, int last, int (&column)[kPkEight],
                               float (&value)[kPkEight]) {
#pragma unroll
  for (int j = 0; j < kPkEight; ++j) column[j] = 0, value[j] = 0.0f;
  if (i >= last) return;
  if (even && i + kPkEight <= v.kept) {
    const uint4 packed = *reinterpret_cast<const uint4 *>(v.positions + i);
    const unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int j = 0; j < kPkEight; ++j) column[j] = static_cast<int>((words[j / 2] >> (j % 2 * 16)) & 0xffffu);
    if (v.source == nullptr) {
      pk_packed_read<kType, 4>(v.values, i, *reinterpret_cast<float (*)[4]>(value));
      pk_packed_read<kType, 4>(v.values, i + 4, *reinterpret_cast<float (*)[4]>(value + 4));
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < kPkEight; ++j) {
    if (i + j < first || i + j >= last) continue;
    column[j] = v.positions[i + j];
    value[j] = pk_packed_value<kType>(v, i + j);
  }
}

template <int kType, int kBatch>
PK_DEVICE void pk_packed_few(const PaikernPacked &v, const void *x, int batch, const void *bias, int lanes,
                             long long parts, void *y) {
  const long long thread = static_cast<long long>(blockIdx.x) * kPkPackedBlock + threadIdx.x;
  const long long item = thread / lanes, part = item / v.rows, row = item - part * v.rows;
  const int lane = static_cast<int>(thread % lanes);
  const unsigned long long places =
      reinterpret_cast<unsigned long long>(v.positions) | reinterpret_cast<unsigned long long>(v.values);
  float sums[kBatch] = {};
  if (part < parts) {
    const PaikernEntries entries = pk_packed_part(v, row, part, parts, kPkEight);
    pk_packed_groups(v, row, entries, [&](long long base, int first, int last) {
      for (int i = first / kPkEight * kPkEight + lane * kPkEight; i < last; i += lanes * kPkEight) {
        int column[kPkEight];
        float value[kPkEight];
        pk_packed_eight<kType>(v, places % 16 == 0, i, first, last, column, value);
#pragma unroll
        for (int j = 0; j < kPkEight; ++j) {
          const bool counts = i + j >= first && i + j < last;
#pragma unroll
          for (int n = 0; n < kBatch; ++n) {
            if (counts && n < batch) {
              sums[n] = __fmaf_rn(value[j], pk_value(x, kType, n * v.columns + base + column[j]), sums[n]);
            }
          }
        }
      }
    });
  }
#pragma unroll
  for (int n = 0; n < kBatch; ++n) {
    for (int by = lanes / 2; by > 0; by /= 2) sums[n] = __fadd_rn(sums[n], __shfl_xor_sync(0xffffffffu, sums[n], by));
    if (part < parts && lane == 0 && n < batch) {
      pk_packed_store(y, kType, bias, parts == 1, (part * batch + n) * v.rows + row, row, sums[n]);
    }
  }
}

template <int kType>
PK_DEVICE void pk_packed_few_of(const PaikernPacked &v, const void *x, long long batch, const void *bias,
                                long long lanes, long long parts, void *y) {
  const int some = static_cast<int>(batch), wide = static_cast<int>(lanes);
  if (batch == 1) return pk_packed_few<kType, 1>(v, x, some, bias, wide, parts, y);
  if (batch == 2) return pk_packed_few<kType, 2>(v, x, some, bias, wide, parts, y);
  pk_packed_few<kType, 4>(v, x, some, bias, wide, parts, y);
}

// x: [batch, columns], batch 1 to 4, and y: [batch, rows], of the type of the values; or with parts > 1 y: [parts,
// batch, rows] float. lanes: 4, 8, 16 or 32; a thread for each of lanes * parts * rows.
extern "C" __global__ void __launch_bounds__(256, 2)
    paikern_masked_few(PK_PACKED_PARAMETERS, long long type, const void *x, long long batch, const void *bias,
                       long long lanes, long long parts, void *y) {
  const PaikernPacked v = PK_PACKED;
  if (type == 0) return pk_packed_few_of<0>(v, x, batch, bias, lanes, parts, y);
  if (type == 1) return pk_packed_few_of<1>(v, x, batch, bias, lanes, parts, y);
  pk_packed_few_of<2>(v, x, batch, bias, lanes, parts, y);
}

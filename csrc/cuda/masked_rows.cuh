// masked_linear of more rows of x by index: y[n, r] = sum over the entries of row r of V[r, c] * x[n, c] + bias[r].
//
// x becomes panels [columns, 32 * wide] of 32 * wide rows of x each once, so that one index gives whole vectors. A warp
// has a row of V, or a part of it, and a panel; a lane has `wide` rows of x. Entries are read 32 at a time and handed
// round by shuffles. Bytes moved: the entries once for each panel, 32 * wide values of x from L2 for each entry, which
// is the limit. dX is the same product with the transposed positions, whose values are read through `source`.
//
// A sum is in the order of the entries; parts are added by paikern_masked_parts. Not yet measured on a GPU.
#pragma once

#include "masked.cuh"

constexpr int kPkAtOnce = 8;  // vectors of x on their way

// One for all types of a kernel.
template <int kWide>
PK_DEVICE float (&pk_packed_tile())[32 * kWide][kPkPackedWarps + 1] {
  __shared__ float tile[32 * kWide][kPkPackedWarps + 1];
  return tile;
}

template <int kType, int kWide>
PK_DEVICE void pk_packed_rows(const PaikernPacked &v, const void *panels, long long batch, const void *bias,
                              long long parts, void *y) {
  constexpr int kWidth = 32 * kWide;
  auto &tile = pk_packed_tile<kWide>();
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const long long groups = (v.rows + kPkPackedWarps - 1) / kPkPackedWarps;
  const long long item = blockIdx.x / groups, first_row = (blockIdx.x - item * groups) * kPkPackedWarps;
  const long long number = item / parts, part = item - number * parts;  // of the panel, and of the part
  const long long row = first_row + warp;
  float sums[kWide] = {};
  if (row < v.rows) {
    const PaikernEntries entries = pk_packed_part(v, row, part, parts, 32);
    pk_packed_groups(v, row, entries, [&](long long base, int first, int last) {
      const long long from = (number * v.columns + base) * kWidth + lane * kWide;
      for (int i = first; i < last; i += 32) {
        const bool mine = i + lane < last;
        const int column = mine ? v.positions[i + lane] : 0, count = last - i < 32 ? last - i : 32;
        const float value = mine ? pk_packed_value<kType>(v, i + lane) : 0.0f;
        for (int j = 0; j < count; j += kPkAtOnce) {
          float read[kPkAtOnce][kWide], factor[kPkAtOnce];
#pragma unroll
          for (int u = 0; u < kPkAtOnce; ++u) {
            const int at = __shfl_sync(0xffffffffu, column, j + u);
            factor[u] = __shfl_sync(0xffffffffu, value, j + u);
#pragma unroll
            for (int k = 0; k < kWide; ++k) read[u][k] = 0.0f;
            if (j + u < count) pk_packed_read<kType, kWide>(panels, from + at * kWidth, read[u]);
          }
#pragma unroll
          for (int u = 0; u < kPkAtOnce; ++u) {
#pragma unroll
            for (int k = 0; k < kWide; ++k) sums[k] = __fmaf_rn(factor[u], read[u][k], sums[k]);
          }
        }
      }
    });
  }
#pragma unroll
  for (int k = 0; k < kWide; ++k) tile[lane * kWide + k][warp] = sums[k];
  __syncthreads();
  // Eight rows of V are neighbours in y.
#pragma unroll
  for (int i = 0; i < kWide; ++i) {
    const int at = i * kPkPackedBlock + static_cast<int>(threadIdx.x), n = at / kPkPackedWarps, r = at % kPkPackedWarps;
    const long long place = number * kWidth + n, own = first_row + r;
    if (place >= batch || own >= v.rows) continue;
    pk_packed_store(y, kType, bias, parts == 1, (part * batch + place) * v.rows + own, own, tile[n][r]);
  }
}

template <int kWide>
PK_DEVICE void pk_packed_rows_of(const PaikernPacked &v, long long type, const void *panels, long long batch,
                                 const void *bias, long long parts, void *y) {
  if (type == 0) return pk_packed_rows<0, kWide>(v, panels, batch, bias, parts, y);
  if (type == 1) return pk_packed_rows<1, kWide>(v, panels, batch, bias, parts, y);
  pk_packed_rows<2, kWide>(v, panels, batch, bias, parts, y);
}

// panels: as paikern_masked_panels writes them; y as that of paikern_masked_few. Blocks: eight rows of a part and a
// panel each.
extern "C" __global__ void __launch_bounds__(256, 2)
    paikern_masked_rows_1(PK_PACKED_PARAMETERS, long long type, const void *panels, long long batch, const void *bias,
                          long long parts, void *y) {
  pk_packed_rows_of<1>(PK_PACKED, type, panels, batch, bias, parts, y);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    paikern_masked_rows_2(PK_PACKED_PARAMETERS, long long type, const void *panels, long long batch, const void *bias,
                          long long parts, void *y) {
  pk_packed_rows_of<2>(PK_PACKED, type, panels, batch, bias, parts, y);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    paikern_masked_rows_4(PK_PACKED_PARAMETERS, long long type, const void *panels, long long batch, const void *bias,
                          long long parts, void *y) {
  pk_packed_rows_of<4>(PK_PACKED, type, panels, batch, bias, parts, y);
}

// x [batch, columns] -> panels [ceil(batch / width), columns, width], zero beyond the batch. A block has 32 rows of x
// and 32 columns.
template <class Word>
PK_DEVICE void pk_packed_panels_of(const Word *x, long long batch, long long columns, long long width, Word *panels) {
  __shared__ Word tile[32][33];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const long long across = (columns + 31) / 32, down = blockIdx.x / across;
  const long long column = (blockIdx.x - down * across) * 32;
  for (int n = warp; n < 32; n += kPkPackedWarps) {
    const bool there = down * 32 + n < batch && column + lane < columns;
    tile[n][lane] = there ? x[(down * 32 + n) * columns + column + lane] : static_cast<Word>(0);
  }
  __syncthreads();
  const long long first = down * 32 / width * columns * width + down * 32 % width;
  for (int c = warp; c < 32 && column + c < columns; c += kPkPackedWarps) {
    panels[first + (column + c) * width + lane] = tile[lane][c];
  }
}

extern "C" __global__ void __launch_bounds__(256, 2)
    paikern_masked_panels(const void *x, long long type, long long batch, long long columns, long long width,
                          void *panels) {
  if (type == 0) {
    pk_packed_panels_of(static_cast<const unsigned *>(x), batch, columns, width, static_cast<unsigned *>(panels));
  } else {
    pk_packed_panels_of(static_cast<const unsigned short *>(x), batch, columns, width,
                        static_cast<unsigned short *>(panels));
  }
}

// y[i] = sum over the parts, in their order, of partial[part, i], and the bias; y is [batch, rows].
extern "C" __global__ void __launch_bounds__(256, 2)
    paikern_masked_parts(const float *partial, long long parts, long long rows, long long count, long long type,
                         const void *bias, void *y) {
  const long long i = static_cast<long long>(blockIdx.x) * kPkPackedBlock + threadIdx.x;
  if (i >= count) return;
  float sum = partial[i];
  for (long long part = 1; part < parts; ++part) sum = __fadd_rn(sum, partial[part * count + i]);
  pk_packed_store(y, type, bias, true, i, i % rows, sum);
}

// masked_linear of up to 64 rows of x by bitmap, bf16 and fp16: bits and values become the A operands of tensor cores.
//
//   y[n, r] = sum over c of V[r, c] * x[n, c] + bias[r]
//
// A block has 32 rows of V, two tiles of 16, and its eight warps an eighth of the columns each, 32 at a time. Lane l
// has the 32 bits of row l and the number of its next value. Values of the 32 columns are neighbours: four lanes copy
// those of a row in aligned sixteens into shared memory, asynchronously, one chunk ahead. Lane (g, t) = (l / 4, l % 4)
// then makes the operands of row g: it has columns 8 t .. 8 t + 7, four for each of two products, and takes the value
// whose number is how many bits are set before. The order of the 16 columns of a product is free as long as x has the
// same: those of x are then 16 neighbouring bytes of a row. Chunks of 64 columns, held in registers one ahead, took 255
// registers where these take a third.
//
// Bytes moved: 1/8 a weight, read twice, the second time from the caches, and 2 a kept weight; x from L2 for every 32
// rows. Limit: memory bandwidth up to some 16 rows of x, then L2; per weight it is a test of a bit and, where it is
// set, a read of shared memory. A zero is multiplied like any weight: NaN in x reaches all rows.
//
// A sum is in the order of tensor cores within 32 columns, then that of the warp's columns, then that of the warps;
// parts are added by paikern_masked_parts. Not yet measured on a GPU.
#pragma once

#include "masked_bits.cuh"
#include "mma.cuh"

constexpr int kPkChunk = 32;                // columns of a warp at a time
constexpr int kPkTileRows = 32;             // of a block
constexpr int kPkStagePitch = (4 + 1) * 8;  // halves of a row in shared memory: 32, and up to seven before them
constexpr int kPkStage = kPkTileRows * kPkStagePitch;

struct alignas(16) PaikernDecoded {
  unsigned short values[kPkPackedWarps][2][kPkStage];
  int counts[kPkPackedWarps][kPkTileRows];
};

// One for all types of a kernel. The sums of the warps take the place of the values at the end.
PK_DEVICE PaikernDecoded &pk_decoded() {
  __shared__ PaikernDecoded decoded;
  return decoded;
}

// The bits of one row, which begin at bit `line`; columns from `last` on are none.
struct PaikernBitLine {
  const unsigned char *mask;
  long long line;
  int last;
  bool even;  // it begins at a word
};

PK_DEVICE unsigned pk_decode_bits(const PaikernBitLine &own, int column) {
  if (column >= own.last) return 0;
  const long long bit = own.line + column;
  if (own.even) return reinterpret_cast<const unsigned *>(own.mask)[bit / 32];
  return pk_packed_word(own.mask, bit, own.line + own.last);
}

// The values of a chunk on their way to shared memory: piece i of a row are its sixteens from the first value on.
PK_DEVICE void pk_decode_copy(const PaikernPacked &v, unsigned bits, int offset, unsigned short *stage) {
  const auto *values = static_cast<const unsigned short *>(v.values);
  const int lane = static_cast<int>(threadIdx.x % 32), run = bits == 0 ? 0 : (offset & 7) + __popc(bits);
  const auto copy = [&](int row, int piece, int first, int count) {
    if (piece * 8 >= count) return;
    const long long at = (first & ~7) + piece * 8, left = v.kept - at;
    pk_copy_16(stage + row * kPkStagePitch + piece * 8, values + at, left < 8 ? static_cast<int>(left) * 2 : 16);
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = i * 8 + lane / 4;
    copy(row, lane % 4, __shfl_sync(0xffffffffu, offset, row), __shfl_sync(0xffffffffu, run, row));
  }
  copy(lane, 4, offset, run);
  pk_copies_end();
}

// The operands of one row for two products: words[j] are columns 8 t + 4 j .. 8 t + 4 j + 3.
PK_DEVICE void pk_decode_row(const unsigned short *stage, unsigned bits, int offset, int row, uint2 (&words)[2]) {
  const int t = static_cast<int>(threadIdx.x % 4);
  const unsigned all = __shfl_sync(0xffffffffu, bits, row), own = all >> (8 * t);
  const int first = __shfl_sync(0xffffffffu, offset, row) & 7;
  int at = row * kPkStagePitch + first + __popc(all & ((1u << (8 * t)) - 1u));
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    unsigned halves[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool kept = ((own >> (4 * j + k)) & 1u) != 0;
      halves[k] = kept ? stage[at] : 0u;
      at += kept;
    }
    words[j] = make_uint2(halves[0] | halves[1] << 16, halves[2] | halves[3] << 16);
  }
}

// kTiles: of eight rows of x.
template <int kType, int kTiles>
PK_DEVICE void pk_decode(const PaikernPacked &v, const unsigned char *mask, const void *x, long long pitch,
                         long long batch, const void *bias, long long parts, void *y) {
  PaikernDecoded &shared = pk_decoded();
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const long long across = (v.rows + kPkTileRows - 1) / kPkTileRows, part = blockIdx.x / across;
  const long long top = (blockIdx.x - part * across) * kPkTileRows, row = top + lane < v.rows ? top + lane : -1;
  const long long panels = pk_packed_panels(v), each = (panels + parts - 1) / parts;
  const int columns = static_cast<int>(v.columns);
  const long long begin = part * each * v.panel, beyond = begin + each * v.panel;
  const int end = beyond < v.columns ? static_cast<int>(beyond) : columns;
  const int from = begin < end ? static_cast<int>(begin) : end;
  const int each_warp = ((end - from + kPkChunk - 1) / kPkChunk + kPkPackedWarps - 1) / kPkPackedWarps * kPkChunk;
  const int first = from + warp * each_warp, last = first + each_warp < end ? first + each_warp : end;
  const bool words = v.columns % 32 == 0 && reinterpret_cast<unsigned long long>(mask) % 4 == 0;
  const PaikernBitLine own{mask, row < 0 ? 0 : row * v.columns, row < 0 ? 0 : last, words};
  const unsigned short *halves = static_cast<const unsigned short *>(x) + lane / 4 * pitch;

  // Where the values of each warp begin.
  int set = 0;
  for (int column = first; column < last; column += kPkChunk) {
    set += __popc(pk_decode_bits(own, column));
  }
  shared.counts[warp][lane] = set;
  __syncthreads();
  int offset = row < 0 || from == end ? 0 : v.starts[row * panels + part * each];
  for (int w = 0; w < warp; ++w) offset += shared.counts[w][lane];

  float sums[2][kTiles][4] = {};
  auto &stages = shared.values[warp];
  unsigned bits = pk_decode_bits(own, first), coming = pk_decode_bits(own, first + kPkChunk);
  int stage = 0;
  pk_decode_copy(v, bits, offset, stages[0]);
  for (int column = first; column < last; column += kPkChunk, stage ^= 1) {
    const int next = offset + __popc(bits);
    pk_decode_copy(v, coming, next, stages[stage ^ 1]);
    const unsigned later = pk_decode_bits(own, column + 2 * kPkChunk);
    pk_copies_done_but_last();
    __syncwarp();
    uint2 upper[2][2], lower[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      pk_decode_row(stages[stage], bits, offset, i * 16 + lane / 4, upper[i]);
      pk_decode_row(stages[stage], bits, offset, i * 16 + lane / 4 + 8, lower[i]);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int at = column + lane % 4 * 8;
      const bool there = n * 8 + lane / 4 < batch && at < pitch;
      const uint4 eight =
          there ? *reinterpret_cast<const uint4 *>(halves + n * 8 * pitch + at) : make_uint4(0, 0, 0, 0);
      const unsigned right[2][2] = {{eight.x, eight.y}, {eight.z, eight.w}};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const unsigned left[4] = {upper[i][j].x, lower[i][j].x, upper[i][j].y, lower[i][j].y};
          pk_mma<kType>(sums[i][n], left, right[j]);
        }
      }
    }
    __syncwarp();  // the values after the next take the place of these
    bits = coming, coming = later, offset = next;
  }
  pk_copies_done();

  // Those of the warps, one after the other; eight rows of x at a time, a thread for each sum.
  float *of_warps = reinterpret_cast<float *>(&shared.values[0][0][0]);  // [warps, 8, 32 rows]
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int r = i * 16 + k / 2 * 8 + lane / 4, of = lane % 4 * 2 + k % 2;
        of_warps[(warp * 8 + of) * kPkTileRows + r] = sums[i][n][k];
      }
    }
    __syncthreads();
    float sum = of_warps[threadIdx.x];
    for (int w = 1; w < kPkPackedWarps; ++w) sum = __fadd_rn(sum, of_warps[w * kPkPackedBlock + threadIdx.x]);
    const long long place = n * 8 + warp;
    if (row < 0 || place >= batch) continue;
    pk_packed_store(y, kType, bias, parts == 1, (part * batch + place) * v.rows + row, row, sum);
  }
}

template <int kTiles>
PK_DEVICE void pk_decode_of(const PaikernPacked &v, long long type, const unsigned char *mask, const void *x,
                            long long pitch, long long batch, const void *bias, long long parts, void *y) {
  if (type == 1) return pk_decode<1, kTiles>(v, mask, x, pitch, batch, bias, parts, y);
  pk_decode<2, kTiles>(v, mask, x, pitch, batch, bias, parts, y);
}

// values and y as those of paikern_masked_few, of up to 8, 16, 32 or 64 rows of x; x: [batch, pitch], zero beyond the
// columns, with a pitch that is a multiple of eight. Both begin at a multiple of 16 bytes. Blocks: 32 rows of some
// panels each.
extern "C" __global__ void __launch_bounds__(256, 2)
    paikern_masked_decode_1(PK_PACKED_PARAMETERS, long long type, const unsigned char *mask, const void *x,
                            long long pitch, long long batch, const void *bias, long long parts, void *y) {
  pk_decode_of<1>(PK_PACKED, type, mask, x, pitch, batch, bias, parts, y);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    paikern_masked_decode_2(PK_PACKED_PARAMETERS, long long type, const unsigned char *mask, const void *x,
                            long long pitch, long long batch, const void *bias, long long parts, void *y) {
  pk_decode_of<2>(PK_PACKED, type, mask, x, pitch, batch, bias, parts, y);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    paikern_masked_decode_4(PK_PACKED_PARAMETERS, long long type, const unsigned char *mask, const void *x,
                            long long pitch, long long batch, const void *bias, long long parts, void *y) {
  pk_decode_of<4>(PK_PACKED, type, mask, x, pitch, batch, bias, parts, y);
}

extern "C" __global__ void __launch_bounds__(256, 1)
    paikern_masked_decode_8(PK_PACKED_PARAMETERS, long long type, const unsigned char *mask, const void *x,
                            long long pitch, long long batch, const void *bias, long long parts, void *y) {
  pk_decode_of<8>(PK_PACKED, type, mask, x, pitch, batch, bias, parts, y);
}

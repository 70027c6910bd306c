// path_forward, path_backward and path_sweep of one vector: V x, V^T g, and the bits with it. V = |W|**p * M is made
// from the weight [rows, columns] and the bits as they are read.
//
//   forward  z[o] = sum_i V[o, i] * x[i]     a warp has four rows and goes along the columns
//   adjoint  x[i] = sum_o V[o, i] * g[o]     a warp has 32 * 4 columns (8 of two bytes) and goes down four rows at once
//   sweep    the adjoint, and (V[o, i] * a[i]) * g[o] > threshold as bits, in the same read
//   score    V[o, i] * (g[o] * x[i])         one thread a weight
//
// Bytes moved: the weight once, numel / 8 for a mask, numel / 8 for bits; partial sums are below 2 % of it. Each lane
// has four loads of 16 bytes on their way. Rows whose length is no multiple of 16 bytes are read as the two aligned
// sixteens around the wanted ones, the second of which the neighbour has brought into the cache, and shifted. Limit:
// memory bandwidth.
//
// Sums have one order, which follows from the shape: forward, a lane adds along its columns, then the 32 lanes
// pairwise, then the parts of a row; adjoint, a warp adds down its rows, then the eight warps of a block, then the
// parts of a column. Parts are added one after the other, many of them in sets, by the last block to arrive. path_sweep
// is the adjoint with more to do at each weight, so that its sums have the bits of path_backward. Not yet measured on a
// GPU.
#pragma once

#include "path.cuh"

constexpr int kPkRows = 4;             // of a warp, read at once
constexpr int kPkBand = kPkBlock / 8;  // rows of a block, read at once
constexpr long long kPkParts = 4096;   // from which on a product is not cut further
constexpr long long kPkShortest = 4;   // steps of a part at least

PK_DEVICE PaikernCut pk_cut(long long steps, long long others, long long most, long long shortest) {
  if (steps == 0) return {1, 0};
  const long long wanted = pk_least(pk_ceil(steps, shortest), pk_ceil(most, others));
  const long long each = pk_ceil(steps, wanted);
  return {pk_ceil(steps, each), each};
}

// values[0] + values[apart] + ..., one after the other.
PK_DEVICE float pk_add_parts(const float *values, long long count, long long apart) {
  float sum = values[0];
#pragma unroll 8
  for (long long i = 1; i < count; ++i) sum = __fadd_rn(sum, values[i * apart]);
  return sum;
}

// --- sixteen bytes of each of four rows -----------------------------------------------------------------------------

template <int kType>
constexpr int kPkWide = kType == 0 ? 4 : 8;  // elements

struct PaikernMatrix {
  const unsigned char *weight;  // null: power 0, ones of two bytes that nobody reads
  long long rows, columns;
  bool even;    // rows begin at multiples of 16 bytes
  bool square;  // power 2
};

template <int kType>
PK_DEVICE PaikernMatrix pk_matrix(const PaikernProduct &p) {
  const long long columns = p.geometry[2];
  const bool even = columns % kPkWide<kType> == 0 && reinterpret_cast<unsigned long long>(p.weight) % 16 == 0;
  return {p.power == 0 ? nullptr : static_cast<const unsigned char *>(p.weight), p.geometry[1], columns, even,
          p.power == 2};
}

PK_DEVICE void pk_words(const uint4 &from, unsigned *words) {
  words[0] = from.x, words[1] = from.y, words[2] = from.z, words[3] = from.w;
}

// The 16 bytes that begin `from` bytes into 32, from even and below 16.
PK_DEVICE void pk_shifted(unsigned *words, unsigned from) {
  if (from & 8u) {
#pragma unroll
    for (int i = 0; i < 6; ++i) words[i] = words[i + 2];
  }
  if (from & 4u) {
#pragma unroll
    for (int i = 0; i < 5; ++i) words[i] = words[i + 1];
  }
  if (from & 2u) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = words[i] >> 16 | words[i + 1] << 16;
  }
}

// raw[r]: the stored weights of row `row + r` from `column` on; rows and columns beyond the matrix hold anything.
template <int kType>
PK_DEVICE void pk_load_rows(const PaikernMatrix &w, long long row, long long column, unsigned (&raw)[kPkRows][4]) {
  constexpr int kBytes = kType == 0 ? 4 : 2;
#pragma unroll
  for (int r = 0; r < kPkRows; ++r) raw[r][0] = raw[r][1] = raw[r][2] = raw[r][3] = kType == 1 ? 0x3f803f80u : 0u;
  if (column >= w.columns || w.weight == nullptr) return;
  const long long rows = pk_least(kPkRows, w.rows - row), pitch = w.columns * kBytes;
  const unsigned char *first = w.weight + row * pitch + column * kBytes;
  if (w.even) {
#pragma unroll
    for (int r = 0; r < kPkRows; ++r) {
      if (r < rows) pk_words(*reinterpret_cast<const uint4 *>(first + r * pitch), raw[r]);
    }
    return;
  }
  const unsigned char *end = w.weight + w.rows * pitch;
  if (first - 15 >= w.weight && first + (rows - 1) * pitch + 32 <= end) {
    uint4 low[kPkRows], high[kPkRows];
    unsigned from[kPkRows];
#pragma unroll
    for (int r = 0; r < kPkRows; ++r) {
      const unsigned long long address = reinterpret_cast<unsigned long long>(first + r * pitch);
      from[r] = static_cast<unsigned>(address & 15);
      const uint4 *at = reinterpret_cast<const uint4 *>(address - from[r]);
      low[r] = high[r] = uint4{0, 0, 0, 0};
      if (r < rows) low[r] = at[0];
      if (r < rows) high[r] = at[1];
    }
#pragma unroll
    for (int r = 0; r < kPkRows; ++r) {
      unsigned words[8];
      pk_words(low[r], words);
      pk_words(high[r], words + 4);
      pk_shifted(words, from[r]);
#pragma unroll
      for (int i = 0; i < 4; ++i) raw[r][i] = words[i];
    }
    return;
  }
  const long long there = pk_least(kPkWide<kType>, w.columns - column);
#pragma unroll
  for (int r = 0; r < kPkRows; ++r) {
    raw[r][0] = raw[r][1] = raw[r][2] = raw[r][3] = 0;
#pragma unroll
    for (int j = 0; j < kPkWide<kType>; ++j) {
      if (r >= rows || j >= there) continue;
      const unsigned char *at = first + r * pitch + j * kBytes;
      if (kType == 0) {
        raw[r][j % 4] = *reinterpret_cast<const unsigned *>(at);
      } else {
        raw[r][j / 2] |= static_cast<unsigned>(*reinterpret_cast<const unsigned short *>(at)) << (j % 2 * 16);
      }
    }
  }
}

// bits[r]: bit j is set where V[row + r, column + j] counts; 0 beyond the matrix.
template <int kType>
PK_DEVICE void pk_load_bits(const PaikernProduct &p, const PaikernMatrix &w, long long row, long long column,
                            unsigned (&bits)[kPkRows]) {
  const long long left = w.columns - column;
  const int there = static_cast<int>(left < 0 ? 0 : pk_least(kPkWide<kType>, left));
#pragma unroll
  for (int r = 0; r < kPkRows; ++r) {
    bits[r] = row + r < w.rows ? (1u << there) - 1u : 0u;
    if (p.mask == nullptr || bits[r] == 0) continue;
    const long long bit = p.first_bit + (row + r) * w.columns + column;
    const unsigned char *at = p.mask + (bit >> 3);
    const int from = static_cast<int>(bit & 7);
    unsigned word = at[0];
    if (from + there > 8) word |= static_cast<unsigned>(at[1]) << 8;
    bits[r] &= word >> from;
  }
}

// V of element j of a row.
template <int kType>
PK_DEVICE float pk_element(const PaikernMatrix &w, const unsigned (&raw)[4], unsigned bits, int j) {
  const float read = pk_magnitude<kType>(kType == 0 ? raw[j & 3] : raw[j / 2] >> (j % 2 * 16));
  const float value = w.square ? __fmul_rn(read, read) : read;
  return (bits >> j) & 1u ? value : 0.0f;
}

// A part of a vector as it is read, 0 beyond its end.
template <int kWide>
PK_DEVICE void pk_load_vector(const float *from, long long at, long long count, const PaikernReader &reader,
                              float (&values)[kWide]) {
#pragma unroll
  for (int j = 0; j < kWide; ++j) values[j] = 0.0f;
  if (at + kWide <= count) {
#pragma unroll
    for (int j = 0; j < kWide; j += 4) {
      const float4 four = *reinterpret_cast<const float4 *>(from + at + j);
      values[j] = four.x, values[j + 1] = four.y, values[j + 2] = four.z, values[j + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      if (at + j < count) values[j] = from[at + j];
    }
  }
#pragma unroll
  for (int j = 0; j < kWide; ++j) values[j] = pk_read(reader, values[j]);
}

// --- forward --------------------------------------------------------------------------------------------------------

template <int kType>
PK_DEVICE void pk_forward_rows(const PaikernProduct &p, long long block, long long blocks) {
  constexpr int kWide = kPkWide<kType>, kStep = 32 * kWide;
  const PaikernMatrix w = pk_matrix<kType>(p);
  const PaikernReader reader = pk_reader(p.x_scale, p.counts != 0);
  const long long groups = pk_ceil(w.rows, kPkBand);
  const PaikernCut cut = pk_cut(pk_ceil(w.columns, kStep), groups, kPkParts, kPkShortest);
  const int thread = pk_thread(), lane = thread % 32, warp = thread / 32;
  unsigned top = 0;
  for (long long item = block; item < groups * cut.parts; item += blocks) {
    const long long group = item / cut.parts, part = item - group * cut.parts;
    const long long row = group * kPkBand + warp * kPkRows;
    const long long end = pk_least(w.columns, (part + 1) * cut.steps * kStep);
    float sums[kPkRows] = {};
    if (row < w.rows) {
      for (long long step = part * cut.steps * kStep; step < end; step += kStep) {
        const long long column = step + lane * kWide;
        unsigned raw[kPkRows][4], bits[kPkRows];
        float x[kWide];
        pk_load_rows<kType>(w, row, column, raw);
        pk_load_bits<kType>(p, w, row, column, bits);
        pk_load_vector<kWide>(p.x, column, w.columns, reader, x);
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
#pragma unroll
          for (int r = 0; r < kPkRows; ++r)
            sums[r] = __fmaf_rn(pk_element<kType>(w, raw[r], bits[r], j), x[j], sums[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kPkRows; ++r) {
      for (int by = 16; by > 0; by /= 2) sums[r] = __fadd_rn(sums[r], __shfl_xor_sync(0xffffffffu, sums[r], by));
    }
    float mine = 0.0f;  // of row `row + lane`
#pragma unroll
    for (int r = 0; r < kPkRows; ++r) mine = lane == r ? sums[r] : mine;
    const bool writes = lane < kPkRows && row + lane < w.rows;
    if (cut.parts == 1) {
      if (writes) p.g[row + lane] = mine;
      if (writes) pk_note(&top, mine);
      continue;
    }
    if (writes) p.partial[part * w.rows + row + lane] = mine;
    const long long own = group * kPkBand + thread;
    const bool adds = thread < kPkBand && own < w.rows;
    float sum = 0.0f;
    const auto add = [&](long long first, long long count, long long apart) {
      if (adds) sum = pk_add_parts(p.partial + first * w.rows + own, count, apart * w.rows);
    };
    const auto keep = [&](long long to) {
      if (adds) p.partial[to * w.rows + own] = sum;
    };
    if (!pk_join(p.arrived + group * pk_counters(cut.parts), cut.parts, part, add, keep) || !adds) continue;
    p.g[own] = sum;
    pk_note(&top, sum);
  }
  pk_raise_top(p.top, __uint_as_float(top));
}

PK_DEVICE void pk_forward_vector(const PaikernProduct &p, long long block, long long blocks) {
  if (p.type == 1 || p.power == 0) return pk_forward_rows<1>(p, block, blocks);
  if (p.type == 0) return pk_forward_rows<0>(p, block, blocks);
  pk_forward_rows<2>(p, block, blocks);
}

// --- adjoint and sweep ----------------------------------------------------------------------------------------------

// What a sweep has besides its product.
struct PaikernSweep {
  const float *a;  // [columns], read as p.x_scale says where a map is meant
  const PaikernScale *a_scale;
  float threshold;
  unsigned *bits;             // packed, rows one after the other; zero before unless columns % 8 == 0
  unsigned long long *found;  // how many bits are set, and whether a score is NaN; of a band only the latter
  // Or a band instead of a threshold, as bits of scores: `bits` of those from `beyond` on, `inside` of those from
  // `least` up to before it. Columns are a multiple of 8.
  unsigned least, beyond;
  unsigned *inside;
};

enum PaikernMeets { kPkMeetsNothing, kPkMeetsThreshold, kPkMeetsBand };

// The bits of four rows, of which each lane has kWide.
template <int kWide>
PK_DEVICE void pk_store_bits(unsigned *bits, long long columns, long long row, long long column, int rows,
                             const unsigned (&above)[kPkRows]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int r = 0; r < kPkRows; ++r) {
    unsigned word = above[r];  // of the lanes of a group, up to 32 bits
    const bool bytes = columns % 8 == 0;
    for (int by = 1, wide = kWide; wide < (bytes ? 8 : 32); by *= 2, wide *= 2) {
      word |= __shfl_down_sync(0xffffffffu, word, by) << wide;
    }
    const int each = (bytes ? 8 : 32) / kWide;  // lanes of a group
    if (r >= rows || lane % each != 0 || column >= columns) continue;
    const long long bit = (row + r) * columns + column;
    if (bytes) {
      reinterpret_cast<unsigned char *>(bits)[bit >> 3] = static_cast<unsigned char>(word);
      continue;
    }
    const int from = static_cast<int>(bit & 31);
    unsigned *at = bits + (bit >> 5);
    if (word << from != 0) atomicOr(at, word << from);
    if (from != 0 && word >> (32 - from) != 0) atomicOr(at + 1, word >> (32 - from));
  }
}

template <int kType, int kMeets>
PK_DEVICE void pk_adjoint_rows(const PaikernProduct &p, const PaikernSweep &sweep, long long block, long long blocks) {
  constexpr bool kSweep = kMeets != kPkMeetsNothing, kBand = kMeets == kPkMeetsBand;
  constexpr int kWide = kPkWide<kType>, kStep = 32 * kWide;
  PaikernScratch &scratch = pk_scratch();
  float *shared = scratch.a[0];  // [8, kStep], a and b together
  const PaikernMatrix w = pk_matrix<kType>(p);
  const PaikernReader reader = pk_reader(p.g_scale, p.counts != 0);
  const long long across = pk_ceil(w.columns, kStep), pitch = across * kStep;
  const PaikernCut cut = pk_cut(pk_ceil(w.rows, kPkBand), across, kPkParts, kPkShortest);
  const int thread = pk_thread(), lane = thread % 32, warp = thread / 32;
  unsigned top = 0;
  unsigned long long set = 0;
  bool broken = false;
  for (long long item = block; item < across * cut.parts; item += blocks) {
    const long long part = item / across, strip = item - part * across;
    const long long column = strip * kStep + lane * kWide;
    const long long end = pk_least(w.rows, (part + 1) * cut.steps * kPkBand);
    float sums[kWide] = {}, a[kWide] = {};
    if (kSweep) pk_load_vector<kWide>(sweep.a, column, w.columns, pk_reader(sweep.a_scale, p.counts != 0), a);
    for (long long row = part * cut.steps * kPkBand + warp * kPkRows; row < end; row += kPkBand) {
      unsigned raw[kPkRows][4], bits[kPkRows], above[kPkRows] = {}, inside[kPkRows] = {};
      float g[kPkRows];
      pk_load_rows<kType>(w, row, column, raw);
      pk_load_bits<kType>(p, w, row, column, bits);
#pragma unroll
      for (int r = 0; r < kPkRows; ++r) g[r] = row + r < w.rows ? pk_read(reader, p.g[row + r]) : 0.0f;
#pragma unroll
      for (int r = 0; r < kPkRows; ++r) {
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
          const float value = pk_element<kType>(w, raw[r], bits[r], j);
          sums[j] = __fmaf_rn(value, g[r], sums[j]);
          if (!kSweep) continue;
          const float score = __fmul_rn(__fmul_rn(value, a[j]), g[r]);
          if constexpr (kBand) {
            const unsigned key = __float_as_uint(score);
            above[r] |= static_cast<unsigned>(key >= sweep.beyond) << j;
            inside[r] |= static_cast<unsigned>(key >= sweep.least && key < sweep.beyond) << j;
          } else {
            above[r] |= static_cast<unsigned>(score > sweep.threshold) << j;
          }
          broken = broken || (score != score && ((bits[r] >> j) & 1u) != 0);
        }
        if (kSweep) above[r] &= bits[r];
        if (kBand) inside[r] &= bits[r];
        if (kSweep && !kBand) set += static_cast<unsigned>(__popc(above[r]));
      }
      const int rows = static_cast<int>(pk_least(kPkRows, w.rows - row));
      if (kSweep) pk_store_bits<kWide>(sweep.bits, w.columns, row, column, rows, above);
      if (kBand) pk_store_bits<kWide>(sweep.inside, w.columns, row, column, rows, inside);
    }
    // Those of the warps, one after the other: column thread / 32 of lane thread % 32.
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kWide; ++j) shared[(warp * kWide + j) * 32 + lane] = sums[j];
    __syncthreads();
    float sum = 0.0f;
    if (thread < kStep) {
      sum = shared[thread];
#pragma unroll
      for (int other = 1; other < 8; ++other) sum = __fadd_rn(sum, shared[other * kStep + thread]);
    }
    const long long own = strip * kStep + lane * kWide + warp;
    const bool writes = thread < kStep && own < w.columns;
    if (cut.parts > 1) {
      float *partial = p.partial + strip * kStep + thread;  // in the order of threads
      const auto add = [&](long long first, long long count, long long apart) {
        if (writes) sum = pk_add_parts(partial + first * pitch, count, apart * pitch);
      };
      const auto keep = [&](long long to) {
        if (writes) partial[to * pitch] = sum;
      };
      keep(part);
      if (!pk_join(p.arrived + strip * pk_counters(cut.parts), cut.parts, part, add, keep)) continue;
    }
    if (writes) p.x[own] = sum;
    if (writes) pk_note(&top, sum);
  }
  pk_raise_top(p.top, __uint_as_float(top));
  if constexpr (kBand) {
    if (broken) atomicMax(sweep.found, 1ull);
  } else if constexpr (kSweep) {
    for (int by = 16; by > 0; by /= 2) set += __shfl_xor_sync(0xffffffffu, set, by);
    if (lane == 0 && set != 0) atomicAdd(sweep.found, set);
    if (broken) atomicMax(sweep.found + 1, 1ull);
  }
}

// Of weights of two bytes, and of power 0.
template <int kMeets>
PK_DEVICE void pk_adjoint_16(const PaikernProduct &p, const PaikernSweep &sweep, long long block, long long blocks) {
  if (p.type == 1 || p.power == 0) return pk_adjoint_rows<1, kMeets>(p, sweep, block, blocks);
  pk_adjoint_rows<2, kMeets>(p, sweep, block, blocks);
}

PK_DEVICE void pk_adjoint_vector(const PaikernProduct &p, long long block, long long blocks) {
  if (p.type == 0 && p.power != 0) return pk_adjoint_rows<0, kPkMeetsNothing>(p, {}, block, blocks);
  pk_adjoint_16<kPkMeetsNothing>(p, {}, block, blocks);
}

// --- score ----------------------------------------------------------------------------------------------------------

constexpr int kPkFlat = 4 * kPkBlock;  // weights of a block at a time

// Where the elements of a tile of kPkFlat lie, from its first one on; divided in 32 bits.
struct PaikernPlace {
  long long row;
  unsigned column, columns;
};

PK_DEVICE PaikernPlace pk_place(long long first, long long columns) {
  const long long row = first / columns;
  return {row, static_cast<unsigned>(first - row * columns), static_cast<unsigned>(columns)};
}
PK_DEVICE long long pk_row_of(const PaikernPlace &place, unsigned at) {
  return place.row + (place.column + at) / place.columns;
}
PK_DEVICE unsigned pk_column_of(const PaikernPlace &place, unsigned at) { return (place.column + at) % place.columns; }

PK_DEVICE void pk_score_vector(const PaikernProduct &p, float pruned, float *out, long long block, long long blocks) {
  const long long columns = p.geometry[2], count = p.geometry[1] * columns;
  const PaikernReader x_reader = pk_reader(p.x_scale, p.counts != 0), g_reader = pk_reader(p.g_scale, p.counts != 0);
  for (long long first = block * kPkFlat; first < count; first += blocks * kPkFlat) {
    const PaikernPlace place = pk_place(first, columns);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned at = static_cast<unsigned>(i) * kPkBlock + threadIdx.x;
      if (first + at >= count) continue;
      const PaikernStored stored = pk_stored(p, first + at);
      const float g = pk_read(g_reader, p.g[pk_row_of(place, at)]), x = pk_read(x_reader, p.x[pk_column_of(place, at)]);
      out[first + at] = stored.kept ? __fmul_rn(pk_made(p, stored), __fmul_rn(g, x)) : pruned;
    }
  }
}

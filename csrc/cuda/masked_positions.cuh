// Where the kept weights are, and the way between a packed and a dense weight.
//
//   list       bits -> 16-bit columns and starts: bits are counted for each panel of each row, the counts added up, the
//              positions written; the bits are read twice, 2 bytes a kept weight written
//   transpose  a stable sort of the entries by column: entries are counted for each column and block of rows, the
//              counts added up, and each block of rows goes down its rows in order, where columns differ within a row
//   scatter    values -> dense [rows, columns], written once, by bits at once and by columns through shared memory, a
//              panel at a time; panels that do not fit go to a dense of zeros
//   gather     dense -> values; of some rows, so that a gradient need not be dense as a whole
//
// Integers are added by atomics where only counts follow from them; every result is that of the CPU, bit for bit.
// Not yet measured on a GPU.
#pragma once

#include "block_scan.cuh"
#include "masked_bits.cuh"

#ifndef PK_DYNAMIC_SHARED  // csrc/testing/cuda_on_cpu.h brings its own
#define PK_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

constexpr int kPkScanBlock = 1024;

// counts[i] -> counts[0] + ... + counts[i]; one block.
extern "C" __global__ void __launch_bounds__(1024) paikern_masked_scan(int *counts, long long count) {
  constexpr int kEach = 4;
  long long before = 0;
  for (long long first = 0; first < count; first += kPkScanBlock * kEach) {
    const long long i = first + static_cast<long long>(threadIdx.x) * kEach;
    int own[kEach] = {};
    long long sum = 0, total;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (i + k < count) own[k] = counts[i + k];
      sum += own[k];
    }
    long long upto = before + pk_upto_in_block<kPkScanBlock>(sum, &total) - sum;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      upto += own[k];
      if (i + k < count) counts[i + k] = static_cast<int>(upto);
    }
    before += total;
  }
}

// A warp for each panel of each row: its first column, and how many it has.
struct PaikernPanel {
  long long cell, row, first, count;
};

PK_DEVICE bool pk_packed_panel(long long rows, long long columns, long long panel, PaikernPanel *found) {
  const long long panels = (columns + panel - 1) / panel;
  const long long cell = static_cast<long long>(blockIdx.x) * kPkPackedWarps + threadIdx.x / 32;
  const long long row = cell / panels, first = (cell - row * panels) * panel;
  *found = {cell, row, first, columns - first < panel ? columns - first : panel};
  return row < rows;
}

// starts[1 + cell] = how many bits are set; starts[0] = 0.
extern "C" __global__ void __launch_bounds__(256)
    paikern_masked_count(const unsigned char *mask, long long rows, long long columns, long long panel, int *starts) {
  PaikernPanel own;
  if (!pk_packed_panel(rows, columns, panel, &own)) return;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const long long bit = own.row * columns + own.first;
  int set = 0;
  for (long long at = lane * 32; at < own.count; at += 1024) {
    set += __popc(pk_packed_word(mask, bit + at, bit + own.count));
  }
  for (int by = 16; by > 0; by /= 2) set += __shfl_xor_sync(0xffffffffu, set, by);
  if (lane == 0) starts[1 + own.cell] = set;
  if (lane == 0 && own.cell == 0) starts[0] = 0;
}

extern "C" __global__ void __launch_bounds__(256)
    paikern_masked_list(const unsigned char *mask, const int *starts, long long rows, long long columns,
                        long long panel, unsigned short *positions) {
  PaikernPanel own;
  if (!pk_packed_panel(rows, columns, panel, &own)) return;
  pk_packed_bits(mask, own.row * columns + own.first, own.count, starts[own.cell],
                 [&](long long at, bool kept, int entry) {
                   if (kept) positions[entry] = static_cast<unsigned short>(own.first + at);
                 });
}

// --- transpose ------------------------------------------------------------------------------------------------------

// counts[1 + column * blocks + b]: entries of the column in block b of `high` rows; a block of threads has one of them.
extern "C" __global__ void __launch_bounds__(256)
    paikern_masked_columns(PK_PACKED_PARAMETERS, long long high, int *counts) {
  const PaikernPacked v = PK_PACKED;
  for (long long r = blockIdx.x * high; r < (blockIdx.x + 1) * high && r < v.rows; ++r) {
    pk_packed_groups(v, r, pk_packed_part(v, r, 0, 1, 1), [&](long long base, int first, int last) {
      for (int i = first + static_cast<int>(threadIdx.x); i < last; i += kPkPackedBlock) {
        atomicAdd(counts + 1 + (base + v.positions[i]) * gridDim.x + blockIdx.x, 1);
      }
    });
  }
}

// next[column * blocks + b]: where the next entry of the column in this block of rows goes.
extern "C" __global__ void __launch_bounds__(256)
    paikern_masked_transpose(PK_PACKED_PARAMETERS, long long high, int *next, unsigned short *t_positions,
                             int *t_source) {
  const PaikernPacked v = PK_PACKED;
  for (long long r = blockIdx.x * high; r < (blockIdx.x + 1) * high && r < v.rows; ++r) {
    pk_packed_groups(v, r, pk_packed_part(v, r, 0, 1, 1), [&](long long base, int first, int last) {
      for (int i = first + static_cast<int>(threadIdx.x); i < last; i += kPkPackedBlock) {
        int *place = next + (base + v.positions[i]) * gridDim.x + blockIdx.x;
        const int to = *place;
        *place = to + 1;
        t_positions[to] = static_cast<unsigned short>(r);
        t_source[to] = i;
      }
    });
    __syncthreads();  // the next row has the same columns
  }
}

// t_starts of each column and panel of rows. ends: `next` as the transpose leaves it, ends[i] is where i + 1 begins.
// Sources of a column ascend, so that a panel begins at the first entry of its rows.
extern "C" __global__ void __launch_bounds__(256)
    paikern_masked_t_starts(const int *starts, long long rows, long long columns, long long panel, const int *ends,
                            long long blocks, const int *t_source, int *t_starts) {
  const long long panels = (columns + panel - 1) / panel, t_panels = (rows + panel - 1) / panel;
  const long long i = static_cast<long long>(blockIdx.x) * kPkPackedBlock + threadIdx.x;
  if (i > columns * t_panels) return;
  const long long column = i / t_panels, p = i - column * t_panels;
  int low = column == 0 ? 0 : ends[column * blocks - 1];
  if (column < columns) {
    const int wanted = starts[p * panel * panels];
    int high = ends[(column + 1) * blocks - 1];
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (t_source[middle] < wanted) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
  }
  t_starts[i] = low;
}

// --- dense ----------------------------------------------------------------------------------------------------------

// Rows from `top` on, as many as there are blocks of eight for; dense begins at row `top`. kScatter: values -> dense.
template <bool kScatter, class Word>
PK_DEVICE void pk_packed_move(const PaikernPacked &v, long long top, Word *dense, Word *values) {
  const long long down = static_cast<long long>(blockIdx.x) * kPkPackedWarps + threadIdx.x / 32, row = top + down;
  if (row >= v.rows) return;  // with its whole warp
  pk_packed_groups(v, row, pk_packed_part(v, row, 0, 1, 1), [&](long long base, int first, int last) {
    Word *line = dense + down * v.columns + base;
#pragma unroll 4
    for (int i = first + static_cast<int>(threadIdx.x % 32); i < last; i += 32) {
      if (kScatter) {
        line[v.positions[i]] = values[i];
      } else {
        values[i] = line[v.positions[i]];
      }
    }
  });
}

template <bool kScatter, class Word>
PK_DEVICE void pk_packed_move_bits(const unsigned char *mask, const int *starts, long long rows, long long columns,
                                   long long panel, long long top, Word *dense, Word *values) {
  PaikernPanel own;
  if (!pk_packed_panel(rows - top, columns, panel, &own)) return;
  const long long panels = (columns + panel - 1) / panel, row = top + own.row;
  Word *line = dense + own.row * columns + own.first;
  pk_packed_bits(mask, row * columns + own.first, own.count, starts[top * panels + own.cell],
                 [&](long long at, bool kept, int entry) {
                   if (at >= own.count) return;
                   if (kScatter) {
                     line[at] = kept ? values[entry] : static_cast<Word>(0);
                   } else if (kept) {
                     values[entry] = line[at];
                   }
                 });
}

// Calls move(dense, values) as words of so many bytes. NVRTC takes generic lambdas for host functions: moves are
// structs.
template <class Move>
PK_DEVICE void pk_packed_words(long long bytes, void *dense, void *values, const Move &move) {
  if (bytes == 1) return move(static_cast<unsigned char *>(dense), static_cast<unsigned char *>(values));
  if (bytes == 2) return move(static_cast<unsigned short *>(dense), static_cast<unsigned short *>(values));
  if (bytes == 4) return move(static_cast<unsigned *>(dense), static_cast<unsigned *>(values));
  move(static_cast<unsigned long long *>(dense), static_cast<unsigned long long *>(values));
}

// A block has a panel of a row: zeros in shared memory, its values among them, and out.
template <class Word>
PK_DEVICE void pk_packed_fill(const PaikernPacked &v, Word *dense, const Word *values) {
  PK_DYNAMIC_SHARED(uint4, line);
  constexpr int kWide = 16 / sizeof(Word);
  const long long panels = pk_packed_panels(v), cell = blockIdx.x, row = cell / panels;
  const long long first = (cell - row * panels) * v.panel;
  const int count = static_cast<int>(v.columns - first < v.panel ? v.columns - first : v.panel);
  const int last = v.starts[cell + 1], low = static_cast<int>(first % kPkPackedColumns);
  Word *words = reinterpret_cast<Word *>(line), *to = dense + row * v.columns + first;
  for (int i = static_cast<int>(threadIdx.x); i * kWide < count; i += kPkPackedBlock) line[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  for (int i = v.starts[cell] + static_cast<int>(threadIdx.x); i < last; i += kPkPackedBlock) {
    words[v.positions[i] - low] = values[i];
  }
  __syncthreads();
  if (v.columns % kWide == 0 && v.panel % kWide == 0 && reinterpret_cast<unsigned long long>(dense) % 16 == 0) {
    for (int i = static_cast<int>(threadIdx.x); i * kWide < count; i += kPkPackedBlock) {
      reinterpret_cast<uint4 *>(to)[i] = line[i];
    }
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kPkPackedBlock) to[i] = words[i];
  }
}

struct PaikernFill {
  const PaikernPacked &v;
  template <class Word>
  __device__ void operator()(Word *dense, const Word *values) const {
    pk_packed_fill(v, dense, values);
  }
};

// bytes: of a value, as below. Blocks: a panel of a row each, with shared memory for one panel, rounded up to 16 bytes.
extern "C" __global__ void __launch_bounds__(256)
    paikern_masked_fill(PK_PACKED_PARAMETERS, long long bytes, void *dense, void *kept_values) {
  const PaikernPacked v = PK_PACKED;
  pk_packed_words(bytes, dense, kept_values, PaikernFill{v});
}

struct PaikernMove {
  const PaikernPacked &v;
  bool scatter;
  long long top;
  template <class Word>
  __device__ void operator()(Word *dense, Word *values) const {
    if (scatter) return pk_packed_move<true>(v, top, dense, values);
    pk_packed_move<false>(v, top, dense, values);
  }
};

// scatter: 1 reads the values and writes the dense rows, 0 the other way; bytes: of a value, 1, 2, 4 or 8. Blocks:
// eight rows each, from row `top` on, which the dense rows begin with.
extern "C" __global__ void __launch_bounds__(256)
    paikern_masked_move(PK_PACKED_PARAMETERS, long long scatter, long long bytes, long long top, void *dense,
                        void *kept_values) {
  const PaikernPacked v = PK_PACKED;
  pk_packed_words(bytes, dense, kept_values, PaikernMove{v, scatter != 0, top});
}

struct PaikernMoveBits {
  const unsigned char *mask;
  const int *starts;
  long long rows, columns, panel;
  bool scatter;
  long long top;
  template <class Word>
  __device__ void operator()(Word *dense, Word *values) const {
    if (scatter) return pk_packed_move_bits<true>(mask, starts, rows, columns, panel, top, dense, values);
    pk_packed_move_bits<false>(mask, starts, rows, columns, panel, top, dense, values);
  }
};

// The same by bits. Blocks: eight panels of rows each.
extern "C" __global__ void __launch_bounds__(256)
    paikern_masked_move_bits(const unsigned char *mask, const int *starts, long long rows, long long columns,
                             long long panel, long long scatter, long long bytes, long long top, void *dense,
                             void *kept_values) {
  pk_packed_words(bytes, dense, kept_values, PaikernMoveBits{mask, starts, rows, columns, panel, scatter != 0, top});
}

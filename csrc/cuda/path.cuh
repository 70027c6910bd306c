// What the kernels of path counting share: one product with a weight, |W|**p masked by bits.
//
//   forward  z[n, o, q] = sum over c, t of V[o, c, t] * x[n, c, q * stride + t * dilation - padding]
//   adjoint  its transpose;    score  V[o, c, t] * sum over n, q of g[n, o, q] * x[n, c, ...]
//
// A linear layer is a convolution of one position, kernel 1. The device functions take the number of a block and of all
// blocks, and give the same bits whatever these are: they run as kernels of their own (one operation), and one after
// the other inside a kernel that goes through a table of layers (a whole sweep). Blocks have 256 threads. How a product
// is cut, and the order of its sums, follow from its shape and the type of its weight alone; how much room that takes
// is said in paikern/backends/cuda_path.py.
//
// Device code without standard headers: nvcc, NVRTC and csrc/testing/cuda_on_cpu.h compile the same text.
#pragma once

#include "map_scale.cuh"

constexpr int kPkBlock = 256;  // of every block that takes part in a product

// A row of eight-byte numbers, or made from the arguments of a kernel.
struct PaikernProduct {
  const void *weight;         // [rows, depth], of which power 0 reads nothing
  long long type;             // 0 fp32, 1 bf16, 2 fp16
  long long power;            // 0, 1 or 2; 0: the mask is the weight
  const unsigned char *mask;  // packed, or null
  long long first_bit;        // where the bits of this weight begin (a step that uses some rows of a parameter)
  const long long *geometry;  // 22 numbers: batch, rows, channels, groups, size, kernel, stride, padding, dilation, out
  float *x;                   // the map of the columns, [batch, channels, *size]; forward reads, adjoint writes it
  float *g;                   // the map of the rows, [batch, rows, *out]; adjoint reads, forward writes it
  const PaikernScale *x_scale;  // how x is read, null for as it is
  const PaikernScale *g_scale;
  PaikernScale *top;           // raised to the maximum of what is written, or null
  float *partial;              // of sums that several blocks share, 16-byte aligned as x and g are
  unsigned *arrived;           // counters of those, zero between launches
  long long counts;            // 1: see pk_reader
  const PaikernScale *source;  // whose exponent *top gets: that of the map that is read; or null
};

// Where an element lies, see path_maps.cuh.
struct PaikernEntry {
  long long a, b;          // offsets that it adds
  int c0, c1, c2, unused;  // coordinates that it adds
};

// The numbers of a product as 32 bits have them.
struct PaikernMaps {
  int batch, rows, channels, groups;  // rows and channels of a group
  int size[3], kernel[3], stride[3], padding[3], dilation[3], out[3];
  int pixels, positions, taps;
};

// The taps that reach the positions of one phase of the strides: first, first + step, ... of each axis.
struct PaikernPhase {
  int at[3], first[3], step[3], count[3];
};

// How many equal parts, of how many steps each.
struct PaikernCut {
  long long parts, steps;
};

// How a product is cut.
struct PaikernPlan {
  int m, n, phases;
  int box[3];            // positions of a phase
  long long high, wide;  // tiles
  long long tiles;
  PaikernCut cut;  // of k, in steps
};

// Shared memory of all device functions of this family: a kernel that calls several pays once. Whoever uses it begins
// with a barrier.
struct alignas(16) PaikernScratch {
  float a[2][16 * 68], b[2][16 * 68];
  PaikernEntry entries[2][16];
  PaikernMaps maps;
  PaikernPlan plan;
  PaikernPhase phase;
  double sums[kPkBlock / 32];
  int last;
};

PK_DEVICE PaikernScratch &pk_scratch() {
  __shared__ PaikernScratch scratch;
  return scratch;
}

// threadIdx.x, read again wherever it is asked for: what follows from it would else be worked out ahead of the loop
// over a table of layers, and held in registers that its products want.
PK_DEVICE int pk_thread() {
#ifdef PAIKERN_CUDA_ON_CPU
  return static_cast<int>(threadIdx.x);
#else
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#endif
}

PK_DEVICE long long pk_ceil(long long count, long long size) { return (count + size - 1) / size; }
PK_DEVICE long long pk_least(long long a, long long b) { return a < b ? a : b; }

// Called by all threads of a block once it has written its part of what `count` blocks share: true in the last of them,
// which then sees what the others wrote.
PK_DEVICE bool pk_last_of(unsigned *arrived, long long count) {
  PaikernScratch &scratch = pk_scratch();
  __threadfence();
  __syncthreads();  // between blocks: what all threads wrote is there before the count says so
  if (threadIdx.x == 0) {
    scratch.last = atomicAdd(arrived, 1u) + 1u == static_cast<unsigned>(count);
    if (scratch.last) *arrived = 0;  // by the last: from any other it could be counted before it is put back
  }
  __syncthreads();
  const bool mine = scratch.last != 0;
  if (mine) __threadfence();
  return mine;
}

// Parts that are added by one block; so many such sums, or fewer, are added by another. About the root of the number of
// parts: a block that adds hundreds of parts would be waited for.
PK_DEVICE long long pk_set(long long parts) {
  long long size = 8;
  while (parts > size * 8 && size * size < parts) size *= 2;
  return size;
}

// Counters of a sum of so many parts.
PK_DEVICE long long pk_counters(long long parts) { return 1 + pk_ceil(parts, pk_set(parts)); }

// Called by all threads of a block once it has written part number `part`: true in the last block, with all parts
// added. add(first, count, apart) adds parts first, first + apart, ... one after the other; keep(part) writes a sum in
// the place of a part, by the threads that read it.
template <class Add, class Keep>
PK_DEVICE bool pk_join(unsigned *arrived, long long parts, long long part, const Add &add, const Keep &keep) {
  const long long size = pk_set(parts), set = part / size, first = set * size;
  const long long count = pk_least(size, parts - first), sets = pk_ceil(parts, size);
  if (!pk_last_of(arrived + 1 + set, count)) return false;
  add(first, count, 1);
  if (sets == 1) return true;
  keep(first);
  if (!pk_last_of(arrived, sets)) return false;
  add(0, sets, size);
  return true;
}

// A running maximum, NaN above infinity.
PK_DEVICE void pk_note(unsigned *top, float value) {
  const unsigned bits = __float_as_uint(value) & 0x7fffffffu;
  *top = bits > *top ? bits : *top;
}

// |w| of the bits of a stored weight.
template <int kType>
PK_DEVICE float pk_magnitude(unsigned raw) {
  if (kType == 0) return __uint_as_float(raw & 0x7fffffffu);
  if (kType == 1) return __uint_as_float((raw & 0x7fffu) << 16);
  // fp16 with its exponent in the place of that of fp32, which is 112 more: exact, subnormals too.
  const unsigned magnitude = raw & 0x7fffu;
  const float finite = __fmul_rn(__uint_as_float(magnitude << 13), 5.192296858534828e33f);
  return magnitude < 0x7c00u ? finite : __uint_as_float(0x7f800000u | magnitude << 13);
}

PK_DEVICE bool pk_kept_bit(const PaikernProduct &p, long long i) {
  const long long bit = p.first_bit + i;
  return p.mask == nullptr || ((p.mask[bit >> 3] >> (bit & 7)) & 1) != 0;
}

// What is loaded of element i, to be made a value once other loads are on their way.
struct PaikernStored {
  unsigned raw;
  bool kept;
};

PK_DEVICE PaikernStored pk_stored(const PaikernProduct &p, long long i) {
  return {p.power == 0 ? 0 : pk_raw(p.weight, p.type, i), pk_kept_bit(p, i)};
}

PK_DEVICE float pk_made(const PaikernProduct &p, const PaikernStored &stored) {
  if (!stored.kept) return 0.0f;  // a NaN under the mask too
  if (p.power == 0) return 1.0f;
  const float w = p.type == 0   ? pk_magnitude<0>(stored.raw)
                  : p.type == 1 ? pk_magnitude<1>(stored.raw)
                                : pk_magnitude<2>(stored.raw);
  return p.power == 2 ? __fmul_rn(w, w) : w;
}

// Whether the product is one of a matrix with one vector.
PK_DEVICE bool pk_one_vector(const long long *geometry) {
  bool one = geometry[0] == 1 && geometry[3] == 1;
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    one = one && geometry[4 + d] == 1 && geometry[7 + d] == 1 && geometry[13 + d] == 0 && geometry[19 + d] == 1;
  }
  return one;
}

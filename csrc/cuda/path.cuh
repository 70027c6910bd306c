// What the kernels of path counting share: one product with a weight, |W|**p masked by bits.
//
//   forward  z[n, o, q] = sum over c, t of V[o, c, t] * x[n, c, q * stride + t * dilation - padding]
//   adjoint  its transpose;    score  V[o, c, t] * sum over n, q of g[n, o, q] * x[n, c, ...]
//
// A linear layer is a convolution of one position, kernel 1. The device functions take the number of a block and of all
// blocks, and give the same bits whatever these are: they run as kernels of their own (one operation), and one after
// the other inside a kernel that goes through a table of layers (a whole sweep).
//
// Device code without standard headers: nvcc, NVRTC and csrc/testing/cuda_on_cpu.h compile the same text.
#pragma once

#include "map_scale.cuh"

// A row of eight-byte numbers, or made from the arguments of a kernel.
struct PaikernProduct {
  const void *weight;         // [rows, depth], of which power 0 reads nothing
  long long type;             // 0 fp32, 1 bf16, 2 fp16
  long long power;            // 0, 1 or 2; 0: the mask is the weight
  const unsigned char *mask;  // packed, or null
  long long first_bit;        // where the bits of this weight begin (a step that uses some rows of a parameter)
  const long long *geometry;  // 22 numbers: batch, rows, channels, groups, size, kernel, stride, padding, dilation, out
  const float *x;             // the map of the columns, [batch, channels, *size]; forward reads, adjoint writes it
  const float *g;             // the map of the rows, [batch, rows, *out]; adjoint reads, forward writes it
  const PaikernScale *x_scale;  // how x is read, null for as it is
  const PaikernScale *g_scale;
  PaikernScale *top;  // raised to the maximum of what is written, or null
  float *partial;     // of sums that several blocks share; its size is said by paikern/backends/cuda_path.py
  unsigned *arrived;  // counters of those, zero between launches
  long long counts;   // 1: see pk_reader
};

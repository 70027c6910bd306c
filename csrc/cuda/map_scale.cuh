// Maps of path counts that are brought into [1, 2) when they are read, not by a pass of their own.
//
// A kernel that makes a map raises `top` to the largest of its values (an order-free maximum of bits, since counts are
// not negative; NaN and infinity end up on top as well) and whoever reads the map multiplies by the power of two that
// brings this maximum into [1, 2). That is exact, and it saves two launches a layer: one that looks for the maximum and
// one that scales.
//
// Device code without standard headers: nvcc, NVRTC and csrc/testing/cuda_on_cpu.h compile the same text.
#pragma once

#include "scores.cuh"

// Of a map in device memory. The values stand for themselves times 2**exponent.
struct PaikernScale {
  unsigned long long top;  // bits of the largest value; 0: values are read as they are
  long long exponent;
};

constexpr float kPkCountFloor = 8.673617379884035e-19f;  // 2**-60, see paikern/pathgraph/flow.py
constexpr long long kPkCountFloorFrom = 50;

// The power of two that reading takes out.
PK_DEVICE long long pk_shift(unsigned long long top) {
  const long long field = static_cast<long long>(top >> 23) & 255;
  return top == 0 ? 0 : (field == 0 ? 1 : field) - 127;
}

// Of the values as they are read.
PK_DEVICE long long pk_exponent_of(const PaikernScale &scale) { return scale.exponent + pk_shift(scale.top); }

// 2**by, 0 below -149, at most 2**127.
PK_DEVICE float pk_power_of_two(long long by) {
  if (by < -149) return 0.0f;
  if (by < -126) return __uint_as_float(1u << static_cast<unsigned>(by + 149));
  return __uint_as_float(static_cast<unsigned>(by > 127 ? 254 : by + 127) << 23);
}

// How the values of a map are read.
struct PaikernReader {
  float factor, floor;  // positive values do not sink below the floor
};

// `counts`: of whole numbers, whose being 0 or not must not depend on rounding.
PK_DEVICE PaikernReader pk_reader(const PaikernScale *scale, bool counts) {
  if (scale == nullptr) return {1.0f, 0.0f};
  const long long shift = pk_shift(scale->top), exponent = scale->exponent + shift;
  const bool low = scale->top != 0 && counts && (exponent > kPkCountFloorFrom || exponent < -kPkCountFloorFrom);
  return {pk_power_of_two(-shift), low ? kPkCountFloor : 0.0f};
}

PK_DEVICE float pk_read(const PaikernReader &reader, float value) {
  const float scaled = __fmul_rn(value, reader.factor);
  return value > 0.0f && scaled < reader.floor ? reader.floor : scaled;
}

// Raises `scale->top` to the largest of the values that the threads of a block hold, with one atomic of each warp; all
// threads of a warp call it. Null: nobody wants to know.
PK_DEVICE void pk_raise_top(PaikernScale *scale, float largest) {
  if (scale == nullptr) return;
  unsigned bits = __float_as_uint(largest) & 0x7fffffffu;
  for (int by = 16; by > 0; by /= 2) {
    const unsigned other = __shfl_xor_sync(0xffffffffu, bits, by);
    bits = other > bits ? other : bits;
  }
  if (threadIdx.x % 32 == 0 && bits != 0) atomicMax(&scale->top, static_cast<unsigned long long>(bits));
}

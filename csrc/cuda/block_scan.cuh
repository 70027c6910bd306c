// Prefix sums over the threads of a block.
//
// Device code without standard headers: nvcc, NVRTC and csrc/testing/cuda_on_cpu.h compile the same text.
#pragma once

#include "scores.cuh"

// The sum of the values of this thread and those before it; *total of all. A block of kThreads calls it.
template <int kThreads>
PK_DEVICE long long pk_upto_in_block(long long value, long long *total) {
  __shared__ long long sums[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int by = 1; by < 32; by *= 2) {
    const long long other = __shfl_up_sync(0xffffffffu, value, by);
    if (lane >= by) value += other;
  }
  if (lane == 31) sums[warp] = value;
  __syncthreads();
  *total = 0;
#pragma unroll 4
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w == warp) value += *total;
    *total += sums[w];
  }
  __syncthreads();  // the sums may be written again
  return value;
}

// Philox4x32-10 (csrc/cpu/philox.h is the twin): a function of a counter and a key, so that every thread has the draws
// of its own without those before. Source: Salmon, Moraes, Dror and Shaw, SC 2011.
//
// Device code without standard headers: nvcc, NVRTC and csrc/testing/cuda_on_cpu.h compile the same text.
#pragma once

#include "scores.cuh"

PK_DEVICE uint4 pk_philox(uint4 counter, unsigned long long seed) {
  unsigned low = static_cast<unsigned>(seed), high = static_cast<unsigned>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned left = __umulhi(0xD2511F53u, counter.x), right = __umulhi(0xCD9E8D57u, counter.z);
    counter =
        make_uint4(right ^ counter.y ^ low, 0xCD9E8D57u * counter.z, left ^ counter.w ^ high, 0xD2511F53u * counter.x);
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return counter;
}

// One of `count` choices; `word` keeps what is left of the randomness.
PK_DEVICE long long pk_choose(unsigned *word, long long count) {
  const unsigned long long product = static_cast<unsigned long long>(*word) * static_cast<unsigned long long>(count);
  *word = static_cast<unsigned>(product);
  return static_cast<long long>(product >> 32);
}

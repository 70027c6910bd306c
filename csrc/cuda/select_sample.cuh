// Steps 1 and 2 of a selection: where the k-th key of each ranking is looked for.
//
//   sample  up to 64 blocks a ranking: 16,384 scores at stratified positions, one a thread (of a ranking that has no
//   more, all
//           of them, so that the band is the k-th key itself)
//   band    one block a ranking: two of them by radix selection in shared memory, 4.5 standard deviations of their rank
//           to either side of k; and the state of the ranking as it is at the beginning
//
// Deterministic: positions come from a hash. A band that misses costs a fall-back (select_radix.cuh), never a wrong
// mask. Bytes moved: 16,384 sectors of 32 bytes a ranking, and 64 KiB twice. Limit: latency. Not yet measured on a GPU.
#pragma once

#include "select.cuh"

constexpr int kPkBandThreads = 1024, kPkSampleEach = 16;
constexpr int kPkSample = kPkBandThreads * kPkSampleEach;

PK_DEVICE unsigned pk_mixed(unsigned x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// Of a key of more than 32 bits the sample holds the upper 31, plus 1: 0 is no score.
PK_DEVICE int pk_dropped(const PaikernSelect &plan) { return plan.width == 32 ? 0 : static_cast<int>(plan.width - 31); }

PK_DEVICE long long pk_lowest(const PaikernSelect &plan, const PaikernRanking &own) {
  __shared__ long long lowest;
  if (threadIdx.x == 0) lowest = 0x7fffffffffffffffll;
  __syncthreads();
  if (plan.width != 32) {
    for (long long l = own.first_layer + threadIdx.x; l < own.last_layer; l += blockDim.x) {
      atomicMin(&lowest, plan.exponents[l]);
    }
  }
  __syncthreads();
  return lowest;
}

// The sampled keys lie where the collected ones will.
extern "C" __global__ void __launch_bounds__(256) paikern_select_sample(const PaikernSelect *plan_at) {
  const PaikernSelect &plan = *plan_at;
  if (plan.stream != nullptr && plan.states[0].stage != kPkMissed) return;
  const unsigned each = gridDim.x / static_cast<unsigned>(plan.ranking_count);  // blocks: as many as the largest needs
  const PaikernRanking &own = plan.rankings[blockIdx.x / each];
  const long long j = static_cast<long long>(blockIdx.x % each) * kPkThreads + threadIdx.x;
  const long long lowest = pk_lowest(plan, own);
  if (j >= own.total) return;
  long long at = j;
  if (own.total > kPkSample) {
    const long long whole = own.total / kPkSample, rest = own.total % kPkSample;
    const long long from = j * whole + j * rest / kPkSample, to = (j + 1) * whole + (j + 1) * rest / kPkSample;
    const unsigned span = static_cast<unsigned>(to - from < 0xffffffffll ? to - from : 0xffffffffll);
    at = from + static_cast<long long>(__umulhi(pk_mixed(static_cast<unsigned>(j)), span));
  }
  at += plan.layers[own.first_layer].first;
  long long low = own.first_layer, high = own.last_layer - 1;  // the last layer that begins at or before it
  while (low < high) {
    const long long middle = (low + high + 1) / 2;
    if (plan.layers[middle].first <= at) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  unsigned key = pk_key(plan.layers[low], at - plan.layers[low].first);
  if (plan.width != 32) {
    key = static_cast<unsigned>(pk_wide(plan, key, plan.exponents[low] - lowest) >> pk_dropped(plan)) + 1;
  }
  plan.keys[own.room + j] = key;
}

// The rank-th largest of the keys of all threads that are not 0, 1 <= rank <= how many there are.
PK_DEVICE unsigned pk_sampled(const unsigned (&keys)[kPkSampleEach], unsigned long long rank) {
  __shared__ unsigned bins[kPkBins];
  unsigned prefix = 0;
  unsigned long long need = rank;
#pragma unroll 1
  for (int left = 32; left > 0;) {
    const int shift = left > kPkDigit ? left - kPkDigit : 0;
    const unsigned mask = (1u << (left - shift)) - 1;
    for (int i = static_cast<int>(threadIdx.x); i < kPkBins; i += kPkBandThreads) bins[i] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPkSampleEach; ++i) {
      const bool shares = left == 32 || keys[i] >> left == prefix;
      if (keys[i] != 0 && shares) atomicAdd(&bins[(keys[i] >> shift) & mask], 1u);
    }
    __syncthreads();
    const PaikernBin found = pk_find_bin(bins, need);
    prefix = prefix << (left - shift) | static_cast<unsigned>(found.bin);
    need -= found.before;
    left = shift;
  }
  return prefix;
}

extern "C" __global__ void __launch_bounds__(1024) paikern_select_band(const PaikernSelect *plan_at) {
  const PaikernSelect &plan = *plan_at;
  if (plan.stream != nullptr && plan.states[0].stage != kPkMissed) return;
  const PaikernRanking &own = plan.rankings[blockIdx.x];
  PaikernState &state = plan.states[blockIdx.x];
  const long long k = plan.k[blockIdx.x], total = own.total;
  const long long lowest = pk_lowest(plan, own);
  if (threadIdx.x == 0) {
    state.lowest = lowest;
    state.above = state.inside = state.equal = state.kth = state.prefix = 0;
    state.stage = kPkSampled;
    state.need = state.left = state.all = 0;
  }
  // Nothing and everything need no band: no key reaches 2**width, and all are above 0.
  unsigned long long low = 0, high = 0;
  if (k <= 0) {
    low = high = 1ull << plan.width;
  } else if (k < total || !plan.emit) {
    const long long taken = total < kPkSample ? total : kPkSample;
    const int dropped = pk_dropped(plan);
    unsigned keys[kPkSampleEach];
#pragma unroll
    for (int i = 0; i < kPkSampleEach; ++i) {
      const long long j = i * kPkBandThreads + static_cast<long long>(threadIdx.x);
      keys[i] = j < taken ? plan.keys[own.room + j] : 0u;
    }
    long long from = k, to = k;
    if (taken < total) {
      const float share = static_cast<float>(static_cast<double>(k) / static_cast<double>(total));
      const float rank = share * kPkSample, reach = 4.5f * sqrtf(rank * (1.0f - share)) + 2.0f;
      from = static_cast<long long>(rank - reach);
      to = static_cast<long long>(rank + reach) + 1;
    }
    const unsigned plus = dropped == 0 ? 0u : 1u;
    high = (1ull << plan.width) - 1;
    if (from >= 1) {
      const unsigned key = pk_sampled(keys, static_cast<unsigned long long>(from));
      high = (static_cast<unsigned long long>(key - plus + 1) << dropped) - 1;
    }
    if (to <= taken) {
      const unsigned key = pk_sampled(keys, static_cast<unsigned long long>(to));
      low = static_cast<unsigned long long>(key - plus) << dropped;
    } else {
      low = 1;
    }
  }
  if (threadIdx.x == 0) {
    state.low = low;
    state.high = high;
  }
}

// Step 4 of a selection: one digit of the k-th key, from the top. Launched as often as a key has digits of 11 bits.
//
// Where the band held (the usual case) the collected keys are counted, of which few bits differ, so that the later
// launches find nothing left to do; else all scores are read again and counted by the same code. A histogram in shared
// memory, added up in device memory; the last block of a ranking looks up the digit and clears the counts.
//
// Bytes moved: 4 a collected key, or the scores, for each digit. Limit of the fall-back: shared-memory additions to the
// same few bins, as most magnitudes have one of a handful of exponents. Not yet measured on a GPU.
#pragma once

#include "select.cuh"

// The digit with the need-th of those that share the prefix.
PK_DEVICE void pk_take_digit(const PaikernSelect &plan, int ranking) {
  unsigned long long *bins = plan.bins + ranking * kPkBins;
  volatile PaikernState &state = plan.states[ranking];
  const long long left = state.left, digit = left < kPkDigit ? left : kPkDigit;
  const PaikernBin found = pk_find_bin(bins, static_cast<unsigned long long>(state.need));
  for (int i = static_cast<int>(threadIdx.x); i < kPkBins; i += kPkThreads) bins[i] = 0;
  if (threadIdx.x != 0) return;
  const unsigned long long need = static_cast<unsigned long long>(state.need) - found.before;
  const unsigned long long prefix = state.prefix << digit | found.bin;
  state.need = static_cast<long long>(need);
  state.prefix = prefix;
  state.equal = found.count;
  state.kth = state.low + (prefix << (left - digit));
  state.all = need == found.count;
  state.left = state.all && plan.emit ? 0 : left - digit;  // all that share the prefix stay: no need to know more
}

extern "C" __global__ void __launch_bounds__(256) paikern_select_digit(const PaikernSelect *plan_at) {
  const PaikernSelect &plan = *plan_at;
  __shared__ unsigned bins[kPkBins];
  const int end = pk_first_tile(plan, blockIdx.x + 1ll);
  for (int tile = pk_first_tile(plan, blockIdx.x); tile < end;) {
    const PaikernPart part = pk_part(plan, tile);
    const PaikernState &state = plan.states[part.ranking];
    const long long left = state.left, stage = state.stage;
    if (stage == kPkDone || left == 0) {
      tile = part.last;
      continue;
    }
    const unsigned long long low = state.low, prefix = state.prefix;
    const long long shift = left > kPkDigit ? left - kPkDigit : 0;
    const unsigned mask = (1u << (left - shift)) - 1;
    for (int i = static_cast<int>(threadIdx.x); i < kPkBins; i += kPkThreads) bins[i] = 0;
    __syncthreads();
    const auto count = [&](unsigned key, long long exponent) {
      const unsigned long long relative = pk_wide(plan, key, exponent) - low;
      if (relative >> left == prefix) atomicAdd(&bins[static_cast<unsigned>(relative >> shift) & mask], 1u);
    };
    for (; tile < part.last; ++tile) {
      const int l = pk_layer_of_tile(plan, tile);
      const long long exponent = pk_exponent(plan, state, l);
      if (stage == kPkCollected) {
        const unsigned *keys = plan.keys + plan.rankings[part.ranking].room + plan.tile_from[tile];
        for (long long i = threadIdx.x; i < plan.tile_count[tile]; i += kPkThreads) count(keys[i], exponent);
      } else {
        pk_each_key<3>(plan.layers[l], tile, [&](int, unsigned key) {
          if (key != 0) count(key, exponent);
        });
      }
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kPkBins; i += kPkThreads) {
      if (bins[i] != 0) atomicAdd(&plan.bins[part.ranking * kPkBins + i], static_cast<unsigned long long>(bins[i]));
    }
    if (pk_last_block(plan, part.ranking)) pk_take_digit(plan, part.ranking);
  }
}

// Step 3 of a selection: the one pass over the scores.
//
// Per tile: the bit "above the band" by ballots (lane i keeps the i-th word, so that a warp stores 128 bytes at once),
// a count of those, and the keys inside the band, by way of shared memory (33 KiB), to a place that the block reserves
// with one addition. The last block of a ranking checks that the k-th key was collected and nothing left out;
// both checks are mandatory: without them a misleading sample would give a wrong mask in silence.
//
// Bytes moved: the scores, n / 8 bytes of mask, 6 bytes for each collected key (2-4 % of n on most data). Limit: the
// read of the scores. Not yet measured on a GPU.
#pragma once

#include "select.cuh"

// What is known after the pass: the ranking is settled, or its k-th key lies among the collected, or it is anywhere.
template <bool kStreamed>
PK_DEVICE void pk_check_band(const PaikernSelect &plan, int ranking) {
  volatile PaikernState &state = plan.states[ranking];
  const unsigned long long k = static_cast<unsigned long long>(plan.k[ranking]), above = state.above;
  const unsigned long long inside = state.inside;
  bool complete = inside <= static_cast<unsigned long long>(plan.rankings[ranking].capacity);
  if (kStreamed && (plan.stream->failed != 0 || plan.stream->nan != 0)) complete = false;
  if (complete && k == above && plan.emit) {
    state.stage = kPkDone;  // everything above the band and nothing else
  } else if (k > above && k - above <= inside && complete) {
    const unsigned long long range = state.high - state.low;
    state.stage = kPkCollected;
    state.need = static_cast<long long>(k - above);
    state.left = range == 0 ? 0 : 64 - __clzll(static_cast<long long>(range));
    state.equal = inside;
    state.all = k - above == inside;
    state.kth = state.low;
    if (state.all && plan.emit) state.left = 0;
  } else if (kStreamed) {
    state.stage = kPkMissed;
    return;
  } else {
    state.stage = kPkAll;
    state.need = static_cast<long long>(k);
    state.low = 0;
    state.left = plan.width;
  }
  if (kStreamed) plan.stream->settled = 1;
}

// kStreamed: a sweep has written the bits above the band and those inside it, of layers that have room for the latter.
template <int kSources, bool kStreamed = false>
PK_DEVICE void pk_filter(const PaikernSelect &plan) {
  __shared__ unsigned long long reserved;
  __shared__ unsigned keys[kPkThreads / 32][kPkEach][32 + 1];  // those in the band; the odd pitch spreads the banks
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int end = pk_first_tile(plan, blockIdx.x + 1ll);
  for (int tile = pk_first_tile(plan, blockIdx.x); tile < end;) {
    const PaikernPart part = pk_part(plan, tile);
    const PaikernRanking &own = plan.rankings[part.ranking];
    PaikernState &state = plan.states[part.ranking];
    unsigned long long above = 0;
    unsigned low = 0, beyond = 0;
    for (int l = 0, behind = -1; tile < part.last; ++tile) {
      if (tile >= behind) {
        l = pk_layer_of_tile(plan, tile);
        behind = tile + static_cast<int>((plan.layers[l].count + kPkTile - 1) / kPkTile);
        behind -= tile - static_cast<int>(plan.layers[l].tile);
        const long long exponent = pk_exponent(plan, state, l);
        low = pk_narrow(plan, state.low, exponent);
        beyond = pk_narrow(plan, state.high + 1, exponent);
      }
      const PaikernLayer &layer = plan.layers[l];
      unsigned word = 0, within = 0;
      const bool swept = kStreamed && layer.inside != nullptr;
      const auto filter = [&](int i, unsigned key) {
        const bool in_band = key >= low && key < beyond && key != 0;
        const unsigned kept = __ballot_sync(0xffffffffu, key >= beyond && key != 0);
        const unsigned inside = __ballot_sync(0xffffffffu, in_band);
        if (in_band) keys[threadIdx.x / 32][i][lane] = key;
        if (lane == i) {
          word = kept;
          within = inside;
        }
      };
      if (swept) {
        word = pk_load_word(layer, layer.bits, tile);
        within = pk_load_word(layer, layer.inside, tile);
      } else if (pk_each_key<kSources>(layer, tile, filter)) {
        atomicMin(plan.nan, static_cast<long long>(l));
      }
      above += static_cast<unsigned>(__popc(word));
      if (plan.emit && !swept) pk_store_word(layer, tile, word);
      unsigned long long total;
      unsigned long long place = pk_sum_before(static_cast<unsigned>(__popc(within)), &total);
      if (threadIdx.x == 0) {
        reserved = total == 0 ? 0 : atomicAdd(&state.inside, total);
        plan.tile_from[tile] = static_cast<long long>(reserved);
        plan.tile_count[tile] = static_cast<long long>(total);
      }
      __syncthreads();
      place += reserved;
      if (total == 0 || reserved + total > static_cast<unsigned long long>(own.capacity)) continue;
      long long to = own.room + static_cast<long long>(place);
      for (; within != 0; within &= within - 1, ++to) {
        const int i = __ffs(static_cast<int>(within)) - 1;
        const long long at = (tile - layer.tile) * kPkTile + threadIdx.x * 32ll + i;
        plan.keys[to] = swept ? pk_key(layer, at) : keys[threadIdx.x / 32][lane][i];
        plan.places[to] = static_cast<unsigned short>(threadIdx.x * 32 + i);
      }
    }
    unsigned long long sum;
    pk_sum_before(above, &sum);
    if (threadIdx.x == 0) atomicAdd(&state.above, sum);
    if (pk_last_block(plan, part.ranking) && threadIdx.x == 0) pk_check_band<kStreamed>(plan, part.ranking);
  }
}

// Nothing to do where a sweep has settled it.
PK_DEVICE bool pk_is_settled(const PaikernSelect &plan) {
  return plan.stream != nullptr && plan.states[0].stage != kPkSampled;
}

// For plans with dense scores and products alone, with vectors among them, and with maps.
extern "C" __global__ void __launch_bounds__(256, 3) paikern_select_filter(const PaikernSelect *plan) {
  if (!pk_is_settled(*plan)) pk_filter<1>(*plan);
}

extern "C" __global__ void __launch_bounds__(256, 3) paikern_select_filter_factored(const PaikernSelect *plan) {
  if (!pk_is_settled(*plan)) pk_filter<2>(*plan);
}

extern "C" __global__ void __launch_bounds__(256) paikern_select_filter_maps(const PaikernSelect *plan) {
  if (!pk_is_settled(*plan)) pk_filter<3>(*plan);
}

// Steps 5 and 6 of a selection: ties, and the bits that the filter could not know.
//
//   ties  where more scores equal the k-th key than fit: how many of them each tile has, and by a scan in the last
//         block how many lie before the tiles of each block
//   emit  the bits of the collected keys, a tile of mask at a time in shared memory; all ties of a tile or none, but
//   for
//         the one tile where they run out, whose scores are read again in order. After a fall-back every tile is
//
// Bytes moved: 6 a collected key and the words of the mask that change; after a fall-back the scores once or twice.
// Not yet measured on a GPU.
#pragma once

#include "select.cuh"

PK_DEVICE bool pk_has_ties(const PaikernState &state) { return state.stage != kPkDone && state.all == 0; }

// Where a block keeps what concerns its part of a ranking: no two parts have the same sum of both numbers.
PK_DEVICE long long pk_slot(long long block, long long ranking) { return block + ranking; }

extern "C" __global__ void __launch_bounds__(256) paikern_select_ties(const PaikernSelect *plan_at) {
  const PaikernSelect &plan = *plan_at;
  const int end = pk_first_tile(plan, blockIdx.x + 1ll);
  for (int tile = pk_first_tile(plan, blockIdx.x); tile < end;) {
    const PaikernPart part = pk_part(plan, tile);
    const PaikernState &state = plan.states[part.ranking];
    if (!pk_has_ties(state)) {
      tile = part.last;
      continue;
    }
    const PaikernRanking &own = plan.rankings[part.ranking];
    unsigned long long in_part = 0;
    for (; tile < part.last; ++tile) {
      const int l = pk_layer_of_tile(plan, tile);
      const long long exponent = pk_exponent(plan, state, l);
      unsigned long long mine = 0, total;
      if (state.stage == kPkCollected) {
        const unsigned *keys = plan.keys + own.room + plan.tile_from[tile];
        for (long long i = threadIdx.x; i < plan.tile_count[tile]; i += kPkThreads) {
          mine += pk_wide(plan, keys[i], exponent) == state.kth;
        }
      } else {
        pk_each_key<3>(plan.layers[l], tile,
                       [&](int, unsigned key) { mine += key != 0 && pk_wide(plan, key, exponent) == state.kth; });
      }
      pk_sum_before(mine, &total);
      if (threadIdx.x == 0) plan.tile_ties[tile] = static_cast<long long>(total);
      in_part += total;
    }
    if (threadIdx.x == 0) {
      *const_cast<volatile long long *>(&plan.parts[pk_slot(blockIdx.x, part.ranking)]) =
          static_cast<long long>(in_part);
    }
    if (!pk_last_block(plan, part.ranking)) continue;
    const long long first = pk_block_of(plan, own.first_tile), last = pk_block_of(plan, own.last_tile - 1);
    unsigned long long before = 0;
    for (long long from = first; from <= last; from += kPkThreads) {
      const long long block = from + threadIdx.x;
      volatile long long *slot = &plan.parts[pk_slot(block, part.ranking)];
      unsigned long long total;
      const unsigned long long value = block <= last ? static_cast<unsigned long long>(*slot) : 0;
      const unsigned long long sum = pk_sum_before(value, &total);
      if (block <= last) *slot = static_cast<long long>(before + sum);
      before += total;
    }
  }
}

// A tile from its scores: the keys above the k-th, and of those equal to it the first `ties`.
PK_DEVICE void pk_emit_scores(const PaikernSelect &plan, const PaikernLayer &layer, int tile, unsigned long long kth,
                              long long exponent, long long ties) {
  unsigned word = 0, equal = 0;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned low = pk_narrow(plan, kth, exponent), beyond = pk_narrow(plan, kth + 1, exponent);
  pk_each_key<3>(layer, tile, [&](int i, unsigned key) {
    const unsigned kept = __ballot_sync(0xffffffffu, key >= beyond && key != 0);
    const unsigned tied = __ballot_sync(0xffffffffu, key >= low && key < beyond && key != 0);
    if (lane == i) {
      word = kept;
      equal = tied;
    }
  });
  unsigned long long total;
  long long rest = ties - static_cast<long long>(pk_sum_before(static_cast<unsigned>(__popc(equal)), &total));
  for (; equal != 0 && rest > 0; --rest) {
    word |= equal & (0u - equal);
    equal &= equal - 1;
  }
  pk_store_word(layer, tile, word);
}

extern "C" __global__ void __launch_bounds__(256) paikern_select_emit(const PaikernSelect *plan_at) {
  const PaikernSelect &plan = *plan_at;
  __shared__ unsigned words[kPkThreads];
  const int end = pk_first_tile(plan, blockIdx.x + 1ll);
  for (int tile = pk_first_tile(plan, blockIdx.x); tile < end;) {
    const PaikernPart part = pk_part(plan, tile);
    const PaikernState &state = plan.states[part.ranking];
    if (state.stage == kPkDone) {
      tile = part.last;
      continue;
    }
    const bool ties = pk_has_ties(state);
    const unsigned long long kth = state.kth;
    const long long need = state.need, room = plan.rankings[part.ranking].room;
    long long before = ties ? plan.parts[pk_slot(blockIdx.x, part.ranking)] : 0;
    for (; tile < part.last; ++tile) {
      const int l = pk_layer_of_tile(plan, tile);
      const long long exponent = pk_exponent(plan, state, l);
      const PaikernLayer &layer = plan.layers[l];
      const long long here = ties ? plan.tile_ties[tile] : 0;
      const bool cut = ties && before < need && need < before + here;
      const bool fits = !ties || before + here <= need;
      if (cut || state.stage == kPkAll) {
        // Without ties to settle, kth may be the lowest of many keys that all stay.
        if (ties) {
          pk_emit_scores(plan, layer, tile, kth, exponent, need - before);
        } else {
          pk_emit_scores(plan, layer, tile, kth - 1, exponent, 0);
        }
      } else if (plan.tile_count[tile] > 0) {
        words[threadIdx.x] = pk_load_word(layer, layer.bits, tile);
        __syncthreads();
        const long long from = room + plan.tile_from[tile];
        for (long long i = threadIdx.x; i < plan.tile_count[tile]; i += kPkThreads) {
          const unsigned long long key = pk_wide(plan, plan.keys[from + i], exponent);
          if (key > kth || (key == kth && fits)) {
            const unsigned place = plan.places[from + i];
            atomicOr(&words[place / 32], 1u << (place % 32));
          }
        }
        __syncthreads();
        pk_store_word(layer, tile, words[threadIdx.x]);
      }
      before += here;
    }
  }
}

// What the kernels of a selection share: the plan, the state of each ranking, sums and histograms of a block.
//
//   keep[i] = rank(score[i]) < k,  rank by (score descending, position ascending)
//
// A ranking is everything (global scope) or one layer. Its scores are cut into tiles of 8,192, none across two layers,
// and tiles into equal runs, one a block, the same in every kernel, so that a block finds again what it wrote and the
// blocks of a ranking can be counted. One call is this fixed sequence of launches, of which those that turn out not to
// be needed return at once; nothing is copied to the host, so that a CUDA graph can hold it:
//
//   sample  select_sample.cuh  16,384 scores
//   band    select_sample.cuh  two keys with the k-th between them, from those
//   filter  select_filter.cuh  ONE read of the scores: bits above the band, count, keys inside it collected
//   digit   select_radix.cuh   a digit of the k-th key: among the collected, or (the band missed it, or overflowed) all
//   ties    select_emit.cuh    if not all scores equal to the k-th key fit: how many of them each tile has
//   emit    select_emit.cuh    the bits of the collected, lowest positions first among equals
//
// Bytes moved: one read of the scores, one bit written, and about 1 byte a score for what is collected. Counts are 64
// bits wide. The last block to arrive at a ranking does its scan and puts its counters back to where they began.
//
// Keys: 32 bits of the score, or, where exponents differ between layers, `width` bits that hold the power of two as
// well (paikern/key_bits.h). Thresholds are kept in those and turned into 32 bits for each layer.
#pragma once

#include "scores.cuh"

constexpr int kPkThreads = 256;
constexpr int kPkEach = 32;                          // scores of a thread in a tile
constexpr int kPkWarpSpan = 32 * kPkEach;            // neighbours that a warp takes
constexpr long long kPkTile = kPkThreads * kPkEach;  // 8,192
constexpr int kPkDigit = 11, kPkBins = 1 << kPkDigit;

// How a ranking stands. With forecasts (select_stream.cuh): the sweeps meet a band; nothing is known; it was sampled.
constexpr long long kPkCollected = 0, kPkAll = 1, kPkDone = 2, kPkStreamed = 3, kPkMissed = 4, kPkSampled = 5;

struct PaikernRanking {
  long long first_layer, last_layer;
  long long first_tile, last_tile;
  long long total;           // scores
  long long room, capacity;  // where its collected keys lie, and how many there may be
  long long unused;
};

struct PaikernState {
  unsigned long long low, high;  // the band, both included
  unsigned long long above;      // scores above it
  unsigned long long inside;     // scores in it
  long long stage;               // kPkCollected, kPkAll or kPkDone
  long long need;                // rank of the wanted key among those that share its prefix
  unsigned long long prefix;     // digits of (key - low) that are known
  long long left;                // bits that are not
  unsigned long long equal;      // scores that share the prefix
  unsigned long long kth;        // the k-th key, or the lowest kept one, once left is 0
  long long all;                 // every score >= kth is kept: no ties to settle
  unsigned long long arrived;    // blocks; 0 between kernels
  long long lowest;              // exponent, of its layers
  long long unused[3];
};

// Where the k-th score of the next round is looked for, from the last two; see select_stream.cuh.
struct PaikernStream {
  double odds[2], log2_kth[2];  // the latest first; log2 of k / (total - k) and of the k-th score
  long long points;             // how many of them there are
  double guess, error;          // of the round at hand, NaN for none; how far off they were of late
  long long lowest;             // exponent, of the last round's layers and some below
  long long failed;             // 1: a layer could not be met by the band
  long long settled;            // 1: the band held
  unsigned long long nan;       // 1: a sweep met NaN, which the ordinary filter is left to name
  long long rounds;             // in which the band held
};

struct PaikernSelect {
  const PaikernLayer *layers;
  const PaikernRanking *rankings;
  PaikernState *states;
  const long long *k;          // of each ranking
  const long long *exponents;  // of each layer, or null
  unsigned long long *bins;    // [rankings, kPkBins], zero between kernels
  unsigned *keys;              // collected
  unsigned short *places;      // collected: position in the tile
  long long *tile_from;        // [tiles] where the collected of a tile lie, from the ranking's room
  long long *tile_count;       // [tiles] how many
  long long *tile_ties;        // [tiles] how many of its scores equal the k-th key
  long long *parts;            // [blocks + rankings] ties before a block's part of a ranking
  long long *nan;              // lowest layer with NaN, or as it was
  long long layer_count, ranking_count, tile_count_all;
  long long width;        // bits of a key
  long long emit;         // whether bits are written
  PaikernStream *stream;  // or null
};

// --- tiles and blocks ---------------------------------------------------------------------------------------------

PK_DEVICE int pk_first_tile(const PaikernSelect &plan, long long block) {
  return static_cast<int>(block * plan.tile_count_all / gridDim.x);
}

PK_DEVICE int pk_block_of(const PaikernSelect &plan, long long tile) {
  return static_cast<int>(((tile + 1) * gridDim.x - 1) / plan.tile_count_all);
}

// The layer with this tile: the last that begins at or before it and is not empty.
PK_DEVICE int pk_layer_of_tile(const PaikernSelect &plan, int tile) {
  int low = 0, high = static_cast<int>(plan.layer_count) - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (plan.layers[middle].tile <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The part of a ranking that lies in this block.
struct PaikernPart {
  int ranking, last;  // the tile behind it
};

PK_DEVICE PaikernPart pk_part(const PaikernSelect &plan, int tile) {
  const int ranking = plan.ranking_count == 1 ? 0 : pk_layer_of_tile(plan, tile);
  const int end = pk_first_tile(plan, blockIdx.x + 1ll), last = static_cast<int>(plan.rankings[ranking].last_tile);
  return {ranking, last < end ? last : end};
}

// Called by all threads after the block has done its part of a ranking: true in the block that is the last one.
PK_DEVICE bool pk_last_block(const PaikernSelect &plan, int ranking) {
  __shared__ int last;
  __threadfence();
  __syncthreads();  // between blocks: what all threads wrote is there before the count says so
  if (threadIdx.x == 0) {
    const PaikernRanking &own = plan.rankings[ranking];
    const int blocks = pk_block_of(plan, own.last_tile - 1) - pk_block_of(plan, own.first_tile) + 1;
    PaikernState &state = plan.states[ranking];
    last = atomicAdd(&state.arrived, 1ull) + 1 == static_cast<unsigned long long>(blocks);
    if (last) state.arrived = 0;  // by the last: from any other it could be counted before it is put back
  }
  __syncthreads();
  const bool mine = last != 0;
  if (mine) __threadfence();
  return mine;
}

// --- sums of a block ----------------------------------------------------------------------------------------------

// The sum of the values of the threads before this one; *total: of all. Any number of whole warps.
PK_DEVICE unsigned long long pk_sum_before(unsigned long long value, unsigned long long *total) {
  __shared__ unsigned long long sums[32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  unsigned long long sum = value;
  for (unsigned by = 1; by < 32; by *= 2) {
    const unsigned long long other = __shfl_up_sync(0xffffffffu, sum, by);
    if (lane >= by) sum += other;
  }
  __syncthreads();  // those of the last call have been read
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  unsigned long long before = sum - value;
  *total = 0;
  for (unsigned w = 0; w < warps; ++w) {
    if (w < warp) before += sums[w];
    *total += sums[w];
  }
  return before;
}

struct PaikernBin {
  unsigned long long bin, before, count;  // before: in higher bins
};

// The bin in which the need-th from the top lies, 1 <= need <= sum of the bins. Read past the caches: other blocks
// added.
template <class Count>
PK_DEVICE PaikernBin pk_find_bin(const volatile Count *bins, unsigned long long need) {
  __shared__ PaikernBin found;
  const int each = kPkBins / static_cast<int>(blockDim.x);
  const int top = kPkBins - 1 - static_cast<int>(threadIdx.x) * each;
  unsigned long long own = 0, total;
  for (int i = 0; i < each; ++i) own += bins[top - i];
  unsigned long long before = pk_sum_before(own, &total);
  if (before < need && need <= before + own) {
    for (int i = 0; i < each; ++i) {
      const unsigned long long count = bins[top - i];
      if (need <= before + count) {
        found = {static_cast<unsigned long long>(top - i), before, count};
        break;
      }
      before += count;
    }
  }
  __syncthreads();
  return found;
}

// --- keys ---------------------------------------------------------------------------------------------------------

PK_DEVICE long long pk_exponent(const PaikernSelect &plan, const PaikernState &state, int layer) {
  return plan.width == 32 ? 0 : plan.exponents[layer] - state.lowest;
}

// The key among all layers of a 32-bit key of one.
PK_DEVICE unsigned long long pk_wide(const PaikernSelect &plan, unsigned key, long long exponent) {
  if (plan.width == 32) return key;
  const long long half = 1ll << (plan.width - 1);
  return static_cast<unsigned long long>(half + paikern::scaled_bits(paikern::bits_of_key(key), exponent, half - 1));
}

// The lowest 32-bit key of a layer whose wide key is at least `wide`; above all of them if there is none.
PK_DEVICE unsigned pk_narrow(const PaikernSelect &plan, unsigned long long wide, long long exponent) {
  if (plan.width == 32) return wide > 0xffffffffull ? 0xffffffffu : static_cast<unsigned>(wide);
  unsigned low = 0x007fffffu, high = 0xff800001u;  // of -infinity; behind that of infinity
  while (low < high) {
    const unsigned middle = low + (high - low) / 2;
    if (pk_wide(plan, middle, exponent) >= wide) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Calls f(i, key) for the 32 keys of this thread in a tile, key 0 behind the end of the layer; returns whether a score
// is NaN. Scores [warp][i][lane], so that a ballot over the i-th is 32 neighbours of the mask. Eight loads are under
// way before the first is used. kSources: the highest source that layers may have.
template <int kSources, class Use>
PK_DEVICE bool pk_each_key(const PaikernLayer &layer, int tile, Use use) {
  constexpr int kAhead = 8;
  const long long base = (tile - layer.tile) * kPkTile, rest = layer.count - base;
  const int end = static_cast<int>(rest < kPkTile ? rest : kPkTile);
  int at = static_cast<int>(threadIdx.x) / 32 * kPkWarpSpan + static_cast<int>(threadIdx.x) % 32;
  const int source = static_cast<int>(layer.source), type = static_cast<int>(layer.type);
  const char *data = static_cast<const char *>(layer.data) + base * pk_bytes(type);
  const unsigned char *candidates = layer.candidates == nullptr ? nullptr : layer.candidates + base / 8;
  bool nan = false;
  const auto give = [&](int i, int here, float value) {
    unsigned bits = __float_as_uint(value);
    if (candidates != nullptr && here < end && ((candidates[here >> 3] >> (here & 7)) & 1) == 0) {
      bits = kPkMinusInfinity;
    }
    nan |= (bits & 0x7fffffffu) > 0x7f800000u;
    use(i, here < end ? paikern::ordered_bits(bits) : 0u);
  };
  if (kSources >= 2 && source >= 2) {
    const int columns = static_cast<int>(layer.columns);
    long long row = (base + at) / columns;
    int column = static_cast<int>(base + at - row * columns);
    constexpr int kFew = 4;
#pragma unroll 1
    for (int first = 0; first < kPkEach; first += kFew, at += 32 * kFew) {
      float values[kFew];
#pragma unroll
      for (int i = 0; i < kFew; ++i) values[i] = at + 32 * i < end ? pk_value(data, type, at + 32 * i) : 0.0f;
#pragma unroll
      for (int i = 0; i < kFew; ++i) {
        if (at + 32 * i < end) values[i] = pk_path_score<kSources == 3>(layer, values[i], row, column);
        give(first + i, at + 32 * i, values[i]);
        column += 32;
        if (column >= columns) {
          const int rows = column / columns;
          row += rows;
          column -= rows * columns;
        }
      }
    }
    return nan;
  }
  const unsigned keep = layer.absolute || source == 1 ? 0x7fffffffu : 0xffffffffu;
#pragma unroll 1
  for (int first = 0; first < kPkEach; first += kAhead, at += 32 * kAhead) {
    unsigned raw[kAhead];
    float values[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) raw[i] = at + 32 * i < end ? pk_raw(data, type, at + 32 * i) : 0u;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) values[i] = pk_widened(raw[i], type);
    if (source == 1) {
      const int other_type = static_cast<int>(layer.other_type);
      const char *other = static_cast<const char *>(layer.other) + base * pk_bytes(other_type);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) raw[i] = at + 32 * i < end ? pk_raw(other, other_type, at + 32 * i) : 0u;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) values[i] = __fmul_rn(values[i], pk_widened(raw[i], other_type));
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      give(first + i, at + 32 * i, __uint_as_float(__float_as_uint(values[i]) & keep));
    }
  }
  return nan;
}

// Word `threadIdx.x` of a tile of the mask: whole, or the bytes that there are at the end of the layer.
PK_DEVICE void pk_store_word(const PaikernLayer &layer, int tile, unsigned word) {
  const long long at = (tile - layer.tile) * kPkTile + threadIdx.x * 32ll;
  if (at + 32 <= layer.count) {
    *reinterpret_cast<unsigned *>(layer.bits + at / 8) = word;
  } else {
    for (int byte = 0; byte < 4 && at + byte * 8 < layer.count; ++byte) {
      layer.bits[at / 8 + byte] = static_cast<unsigned char>(word >> (8 * byte));
    }
  }
}

PK_DEVICE unsigned pk_load_word(const PaikernLayer &layer, const unsigned char *bits, int tile) {
  const long long at = (tile - layer.tile) * kPkTile + threadIdx.x * 32ll;
  if (at + 32 <= layer.count) return *reinterpret_cast<const unsigned *>(bits + at / 8);
  unsigned word = 0;
  for (int byte = 0; byte < 4 && at + byte * 8 < layer.count; ++byte) {
    word |= static_cast<unsigned>(bits[at / 8 + byte]) << (8 * byte);
  }
  return word;
}

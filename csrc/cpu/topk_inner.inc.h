// Bodies of TopkInner; included by topk_portable.cpp, topk_avx2.cpp and topk_avx512.cpp. Plain loops that the
// compiler turns into vectors of the file's instruction set, and intrinsics (topk_group.inc.h) where it does not.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "score_loops.inc.h"
#include "topk_group.inc.h"
#include "topk_inner.h"
#include "topk_nth.inc.h"

namespace {

using paikern::TopkBand;
using paikern::TopkCounts;
using paikern::TopkFound;

void product_scores(const float *x, const float *y, int64_t count, float *out) {
  for (int64_t i = 0; i < count; ++i) out[i] = __builtin_fabsf(x[i] * y[i]);
}

void exclude_others(const uint8_t *candidates, int64_t count, float *values) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  const __m512 excluded = _mm512_set1_ps(-__builtin_inff());
  for (; i + 16 <= count; i += 16) {
    uint16_t bits;
    std::memcpy(&bits, candidates + (i >> 3), 2);
    _mm512_storeu_ps(values + i, _mm512_mask_blend_ps(bits, excluded, _mm512_loadu_ps(values + i)));
  }
#elif defined(__AVX2__)
  const __m256 excluded = _mm256_set1_ps(-__builtin_inff());
  const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (; i + 8 <= count; i += 8) {
    const __m256i bits = _mm256_and_si256(_mm256_set1_epi32(candidates[i >> 3]), lanes);
    const __m256 kept = _mm256_castsi256_ps(_mm256_cmpeq_epi32(bits, lanes));
    _mm256_storeu_ps(values + i, _mm256_blendv_ps(excluded, _mm256_loadu_ps(values + i), kept));
  }
#endif
  for (; i < count; ++i) {
    const bool kept = (candidates[i >> 3] >> (i & 7)) & 1;
    values[i] = kept ? values[i] : -__builtin_inff();
  }
}

// The hardware prefetcher stops at the end of a 4 KiB page and looks no further than the core does, and these loops
// keep the core busy: 1e8 floats took 33 ms with what it does alone and 27 with every line asked for 8 KiB ahead.
constexpr int64_t kAhead = 8192;

template <class Value>
inline void prefetch_group(const Value *values) {
  const char *at = reinterpret_cast<const char *>(values) + kAhead;
  for (size_t line = 0; line < kGroup * sizeof(Value); line += 64) __builtin_prefetch(at + line, 0, 2);
}

// The last group of a piece, padded.
template <class Value>
inline const Value *padded(const Value *values, int64_t count, Value *buffer) {
  std::copy_n(values, count, buffer);
  std::fill(buffer + count, buffer + kGroup, Value{0});
  return buffer;
}

constexpr int64_t kGroups = 64;  // of one sweep: 4096 scores, which are still in L1 when candidates are taken

// Bits and candidates of one group.
template <bool kTies, class Value>
inline uint64_t compare_group(const Group<Value> &group, const TopkBand<Value> &band, uint64_t real, uint64_t *word,
                              TopkCounts *counts) {
  *word = group.template compare<kAtLeast>(band.keep) & real;
  uint64_t inside = group.template compare<kNotBelow>(band.low) & real;
  if constexpr (kTies) {
    inside &= ~group.template compare<kAtLeast>(band.end);
    counts->high += __builtin_popcountll(group.template compare<kEqual>(band.tie_high) & real);
    counts->low += __builtin_popcountll(group.template compare<kEqual>(band.tie_low) & real);
  } else {
    inside &= ~*word;  // without ties the band ends where the kept ones begin
  }
  return inside;
}

// The same for a sweep of whole groups.
template <bool kTies, class Value>
inline void compare_sweep(const Value *values, int64_t groups, bool absolute, const TopkBand<Value> &band,
                          uint8_t *bits, uint64_t *inside, TopkCounts *counts) {
  for (int64_t g = 0; g < groups; ++g) {
    prefetch_group(values + g * kGroup);
    uint64_t word;
    const Group<Value> group(values + g * kGroup, absolute);
    inside[g] = compare_group<kTies>(group, band, ~uint64_t{0}, &word, counts);
    counts->above += __builtin_popcountll(word);
    std::memcpy(bits + 8 * g, &word, 8);
  }
}

// Appends the scores whose bit is set. One by one: at the few in a group that a narrow band leaves, the compress
// instructions (two for values and positions of each vector) took three times as long. The first kSure are written
// whether they are there or not, so that only more than those cost a wrong guess of the branch.
template <int kSure, class Value>
inline void take(const Value *values, bool absolute, uint64_t inside, int64_t first, TopkFound<Value> *found) {
  const auto append = [&](int i) {
    found->values[found->count] = absolute ? std::fabs(values[i]) : values[i];
    found->at[found->count] = static_cast<uint16_t>(first + i);
  };
  for (int n = 0; n < kSure; ++n) {
    append(__builtin_ctzll(inside | uint64_t{1} << 63));
    found->count += inside != 0;
    inside &= inside - 1;
  }
  for (; inside != 0; inside &= inside - 1) {
    append(__builtin_ctzll(inside));
    ++found->count;
  }
}

template <bool kTies, class Value>
bool filter_values(const Value *values, int64_t count, bool absolute, const TopkBand<Value> &band, int64_t first,
                   uint8_t *bits, TopkFound<Value> *found, TopkCounts *counts) {
  TopkFound<Value> mine = *found;  // in registers
  TopkCounts sums = *counts;
  bool room = true;
  const int64_t groups = count / kGroup;
  for (int64_t sweep = 0; room && sweep < groups; sweep += kGroups) {
    uint64_t inside[kGroups];
    const int64_t here = std::min(kGroups, groups - sweep);
    const Value *from = values + sweep * kGroup;
    compare_sweep<kTies>(from, here, absolute, band, bits + 8 * sweep, inside, &sums);
    // Groups with candidates are listed first and taken afterwards: a branch on each would be guessed wrong.
    uint8_t which[kGroups];
    int listed = 0;
    for (int64_t g = 0; g < here; ++g) {
      which[listed] = static_cast<uint8_t>(g);
      listed += inside[g] != 0;
    }
    const auto take_listed = [&](auto sure) {
      for (int i = 0; i < listed; ++i) {
        if (mine.count >= mine.room) return false;
        const int64_t at = which[i] * kGroup;
        take<decltype(sure)::value>(from + at, absolute, inside[which[i]], first + sweep * kGroup + at, &mine);
      }
      return true;
    };
    // With candidates in most groups there are mostly several in each.
    room = 2 * listed > here ? take_listed(std::integral_constant<int, 4>())
                             : take_listed(std::integral_constant<int, 2>());
  }
  const int64_t done = groups * kGroup, left = count - done;
  if (room && left > 0) {
    Value rest[kGroup];
    uint64_t word;
    const Group<Value> group(padded(values + done, left, rest), absolute);
    const uint64_t candidates = compare_group<kTies>(group, band, (uint64_t{1} << left) - 1, &word, &sums);
    sums.above += __builtin_popcountll(word);
    std::memcpy(bits + (done >> 3), &word, static_cast<size_t>((left + 7) >> 3));
    room = mine.count < mine.room || candidates == 0;
    if (room) take<2>(rest, absolute, candidates, first + done, &mine);
  }
  for (int64_t i = found->count; i < mine.count; ++i) sums.nan |= mine.values[i] != mine.values[i];
  *found = mine;
  *counts = sums;
  return room;
}

template <class Value>
bool filter(const Value *values, int64_t count, bool absolute, const TopkBand<Value> &band, int64_t first,
            uint8_t *bits, TopkFound<Value> *found, TopkCounts *counts) {
  return band.ties ? filter_values<true>(values, count, absolute, band, first, bits, found, counts)
                   : filter_values<false>(values, count, absolute, band, first, bits, found, counts);
}

template <class Value>
int64_t settle_ties(const Value *values, int64_t count, bool absolute, Value value, int64_t left, uint8_t *bits) {
  for (int64_t done = 0; done < count; done += kGroup) {
    const int64_t here = std::min(kGroup, count - done);
    Value rest[kGroup];
    const Group<Value> group(here < kGroup ? padded(values + done, here, rest) : values + done, absolute);
    uint64_t tied = group.template compare<kEqual>(value);
    if (here < kGroup) tied &= (uint64_t{1} << here) - 1;
    if (tied == 0) continue;
    uint64_t kept = left > 0 ? tied : 0;
    for (int64_t over = __builtin_popcountll(kept) - left; left > 0 && over > 0; --over) {
      kept &= ~(uint64_t{1} << (63 - __builtin_clzll(kept)));
    }
    left -= __builtin_popcountll(kept);
    uint64_t word = 0;
    const auto bytes = static_cast<size_t>((here + 7) >> 3);
    std::memcpy(&word, bits + (done >> 3), bytes);
    word = (word & ~tied) | kept;
    std::memcpy(bits + (done >> 3), &word, bytes);
  }
  return left;
}

template <class Value>
int64_t keep_candidates(const Value *values, const uint16_t *at, int64_t count, Value keep, Value tie, int64_t ties,
                        uint8_t *bits) {
  const auto set = [&](uint64_t word, int64_t first) {
    for (; word != 0; word &= word - 1) {
      const unsigned position = at[first + __builtin_ctzll(word)];
      bits[position >> 3] = static_cast<uint8_t>(bits[position >> 3] | 1u << (position & 7));
    }
  };
  for (int64_t done = 0; done < count; done += kGroup) {
    const int64_t here = std::min(kGroup, count - done);
    Value rest[kGroup];
    const Group<Value> group(here < kGroup ? padded(values + done, here, rest) : values + done, false);
    const uint64_t real = here < kGroup ? (uint64_t{1} << here) - 1 : ~uint64_t{0};
    set(group.template compare<kAtLeast>(keep) & real, done);
    for (uint64_t tied = group.template compare<kEqual>(tie) & real; tied != 0 && ties > 0; tied &= tied - 1, --ties) {
      set(tied & (~tied + 1), done);
    }
  }
  return ties;
}

#define PAIKERN_TOPK_INNER                                                                                     \
  {                                                                                                            \
    widen_halves, factored_scores, product_scores, exclude_others,                                             \
        {filter<float>, settle_ties<float>, keep_candidates<float>, count_equal<float>, nth_largest<float>}, { \
      filter<double>, settle_ties<double>, keep_candidates<double>, count_equal<double>, nth_largest<double>   \
    }                                                                                                          \
  }

}  // namespace

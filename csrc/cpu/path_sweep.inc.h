// x' = V^T g, the scores (V[i, j] * a[j]) * g[i] against a band, their bits and the candidates: one read of W, bound by
// it. Included by path_kernels.inc.h.
//
// Four rows a pass over partial sums that stay in L1, as the adjoint alone does it: in the same order, with the same
// rounding. The scores need two products and two comparisons more and are not kept: the few candidates are computed
// again from the words that the comparisons leave.
#pragma once

#include "path_sweep.h"

namespace {

using paikern::kSweepColumns;
using paikern::kSweepRows;
using paikern::SweepFound;
using paikern::SweepRows;

inline vf load_tail(const float *p, int count) {
  float lane[kLanes] = {};
  std::memcpy(lane, p, sizeof(float) * static_cast<size_t>(count));
  return v_load(lane);
}

// Bits i .. i + kLanes of a row's words. Written at once: to gather words in registers took twice as long.
inline void store_lanes(uint64_t *words, int64_t i, vm lanes) {
  uint8_t *byte = reinterpret_cast<uint8_t *>(words) + (i >> 3);
#if defined(__AVX512F__)
  const __mmask16 sixteen = lanes;
  std::memcpy(byte, &sixteen, 2);
#elif defined(__AVX2__)
  *byte = static_cast<uint8_t>(v_bits(lanes));
#else
  *byte = static_cast<uint8_t>((i & 4) == 0 ? v_bits(lanes) : *byte | v_bits(lanes) << 4);
#endif
}

// Words of a pass: above, and not below the band; bits of the mask.
template <int Rows>
struct SweepWords {
  uint64_t above[Rows][kSweepColumns / 64], reached[Rows][kSweepColumns / 64], kept[Rows][kSweepColumns / 64];
};

// A group of up to 64 columns, the n-th of the pass.
template <int Power, bool Masked, int Rows, bool Whole, class W>
inline void sweep_group(const W *w, const SweepRows &s, int64_t n, const vf *factor, SweepWords<Rows> &words) {
  const paikern::SweepLayer &layer = *s.layer;
  const int64_t bytes = (layer.w.numel + 7) / 8, j = s.j0 + 64 * n, count = Whole ? 64 : s.j1 - j;
  const vf low = v_set(s.band.low), high = v_set(s.band.high);
  uint64_t kept[Rows];
  if constexpr (Masked) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const int64_t index = (s.row + r) * layer.columns + j;
      kept[r] = mask_bits(layer.w.mask, bytes, index, 32) | mask_bits(layer.w.mask, bytes, index + 32, 32) << 32;
      words.kept[r][n] = kept[r];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 64; i += kLanes) {
    if (!Whole && i >= count) break;
    const int left = !Whole && count - i < kLanes ? static_cast<int>(count - i) : kLanes;
    float *sums = s.sums + 64 * n + i;
    const vf a = left == kLanes ? v_load(layer.a + j + i) : load_tail(layer.a + j + i, left);
    vf sum = v_load(sums);
    uint64_t any = 0;
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const W *p = Power == 0 ? w : w + (s.row + r) * layer.columns + j + i;
      if (Whole && Power != 0) __builtin_prefetch(p + Rows * layer.columns, 0, 2);  // the next pass: 26.9 to 23.6 ms
      vf value = left == kLanes ? magnitude<Power>(p) : magnitude_tail<Power>(p, left);
      if constexpr (Masked) {
        value = v_keep(v_mask(static_cast<uint32_t>(kept[r] >> i)), value);
        any |= kept[r] >> i;
      }
      sum = v_fma(value, factor[r], sum);
      const vf score = v_mul(v_mul(value, a), factor[r]);
      store_lanes(words.above[r], 64 * n + i, v_above(score, high));
      store_lanes(words.reached[r], 64 * n + i, v_not_below(score, low));
    }
    // The adjoint alone passes over such vectors, which shows where g is infinite.
    if (Masked && Power == 0 && (any & ((uint64_t{1} << kLanes) - 1)) == 0) continue;
    v_store(sums, sum);
  }
}

// Appends the candidates of one row. Words that hold some are listed first, and two of each written whether they are
// there or not: a branch on every word would be guessed wrong.
template <int Power, class W>
inline void take_candidates(const W *row, const SweepRows &s, int64_t start, float g, const uint64_t *inside,
                            SweepFound &found) {
  const float *a = s.layer->a;
  uint8_t which[kSweepColumns / 64];
  int listed = 0;
  for (int64_t n = 0; s.j0 + 64 * n < s.j1; ++n) {
    which[listed] = static_cast<uint8_t>(n);
    listed += inside[n] != 0;
  }
  int64_t count = found.count;
  for (int n = 0; n < listed; ++n) {
    uint64_t word = inside[which[n]];
    const int64_t first = s.j0 + 64 * which[n];
    const auto append = [&](int64_t j) {
      float value = 1.0f;
      if constexpr (Power != 0) value = __builtin_fabsf(to_float(row[j]));
      if constexpr (Power == 2) value = value * value;
      found.scores[count] = (value * a[j]) * g;
      found.positions[count] = start + j;
    };
    append(first + __builtin_ctzll(word));
    ++count;
    const uint64_t second = word & (word - 1);
    append(first + __builtin_ctzll(second != 0 ? second : word));
    count += second != 0;
    for (word = second & (second - 1); word != 0; word &= word - 1, ++count) append(first + __builtin_ctzll(word));
  }
  found.count = count;
}

template <int Power, bool Masked, int Rows, class W>
inline void sweep_pass(const W *w, const SweepRows &s, SweepFound &found) {
  const paikern::SweepLayer &layer = *s.layer;
  vf factor[Rows];
  for (int r = 0; r < Rows; ++r) factor[r] = v_set(layer.g[s.row + r]);
  SweepWords<Rows> words;
  const int64_t whole = (s.j1 - s.j0) / 64, left = (s.j1 - s.j0) % 64, all = whole + (left != 0);
  for (int64_t n = 0; n < whole; ++n) sweep_group<Power, Masked, Rows, true>(w, s, n, factor, words);
  if (left != 0) sweep_group<Power, Masked, Rows, false>(w, s, whole, factor, words);
  for (int r = 0; r < Rows; ++r) {
    uint64_t inside[kSweepColumns / 64];
    for (int64_t n = 0; n < all; ++n) {
      uint64_t kept = n < whole ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
      if constexpr (Masked) kept &= words.kept[r][n];
      found.above[r][n] = words.above[r][n] & kept;
      inside[n] = words.reached[r][n] & ~words.above[r][n] & kept;
      found.set += __builtin_popcountll(found.above[r][n]);
    }
    const int64_t start = (s.row + r) * layer.columns;
    take_candidates<Power>(Power == 0 ? w : w + start, s, start, layer.g[s.row + r], inside, found);
  }
}

void sweep_rows(const SweepRows &s, SweepFound &found) {
  with_weights(s.layer->w, [&](auto power, const auto *data) {
    constexpr int kPower = decltype(power)::value;
    const bool masked = s.layer->w.mask != nullptr;
    if (s.rows == kSweepRows) {
      masked ? sweep_pass<kPower, true, kSweepRows>(data, s, found)
             : sweep_pass<kPower, false, kSweepRows>(data, s, found);
    } else {
      masked ? sweep_pass<kPower, true, 1>(data, s, found) : sweep_pass<kPower, false, 1>(data, s, found);
    }
  });
}

}  // namespace

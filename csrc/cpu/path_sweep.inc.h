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

// A group of up to 64 columns from j; the words of the rows become bits of the scores above and within the band.
template <int Power, bool Masked, int Rows, bool Whole, class W>
inline void sweep_group(const W *w, const SweepRows &s, int64_t j, const vf *factor, uint64_t *above,
                        uint64_t *inside) {
  const paikern::SweepLayer &layer = *s.layer;
  const int64_t bytes = (layer.w.numel + 7) / 8, count = Whole ? 64 : s.j1 - j;
  const vf low = v_set(s.band.low), high = v_set(s.band.high);
  uint64_t kept[Rows];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    above[r] = inside[r] = 0;
    kept[r] = Whole ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    if constexpr (Masked) {
      const int64_t index = (s.row + r) * layer.columns + j;
      kept[r] &= mask_bits(layer.w.mask, bytes, index, 32) | mask_bits(layer.w.mask, bytes, index + 32, 32) << 32;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 64; i += kLanes) {
    if (!Whole && i >= count) break;
    const int left = !Whole && count - i < kLanes ? static_cast<int>(count - i) : kLanes;
    if constexpr (Masked && Power == 0) {  // as the adjoint alone, which sees the difference where g is infinite
      uint64_t any = 0;
      for (int r = 0; r < Rows; ++r) any |= kept[r] >> i;
      if ((any & ((uint64_t{1} << kLanes) - 1)) == 0) continue;
    }
    const vf a = left == kLanes ? v_load(layer.a + j + i) : load_tail(layer.a + j + i, left);
    vf sum = v_load(s.sums + (j - s.j0) + i);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const W *p = Power == 0 ? w : w + (s.row + r) * layer.columns + j + i;
      if (Whole && Power != 0) __builtin_prefetch(p + Rows * layer.columns, 0, 2);  // the next pass: 26.9 to 23.6 ms
      vf value = left == kLanes ? magnitude<Power>(p) : magnitude_tail<Power>(p, left);
      if constexpr (Masked) value = v_keep(v_mask(static_cast<uint32_t>(kept[r] >> i)), value);
      sum = v_fma(value, factor[r], sum);
      const vf score = v_mul(v_mul(value, a), factor[r]);
      above[r] |= static_cast<uint64_t>(v_bits(v_above(score, high))) << i;
      inside[r] |= static_cast<uint64_t>(v_bits(v_not_below(score, low))) << i;
    }
    v_store(s.sums + (j - s.j0) + i, sum);
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    above[r] &= kept[r];
    inside[r] &= kept[r] & ~above[r];
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
  uint64_t inside[Rows][kSweepColumns / 64];
  int64_t n = 0;
  for (; s.j0 + 64 * (n + 1) <= s.j1; ++n) {
    uint64_t above_words[Rows], inside_words[Rows];
    sweep_group<Power, Masked, Rows, true>(w, s, s.j0 + 64 * n, factor, above_words, inside_words);
    for (int r = 0; r < Rows; ++r) {
      found.above[r][n] = above_words[r];
      inside[r][n] = inside_words[r];
    }
  }
  if (s.j0 + 64 * n < s.j1) {
    uint64_t above_words[Rows], inside_words[Rows];
    sweep_group<Power, Masked, Rows, false>(w, s, s.j0 + 64 * n, factor, above_words, inside_words);
    for (int r = 0; r < Rows; ++r) {
      found.above[r][n] = above_words[r];
      inside[r][n] = inside_words[r];
    }
  }
  for (int r = 0; r < Rows; ++r) {
    const int64_t start = (s.row + r) * layer.columns;
    take_candidates<Power>(Power == 0 ? w : w + start, s, start, layer.g[s.row + r], inside[r], found);
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

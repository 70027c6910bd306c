// What a sweep needs of a selection that it meets (select_stream.cuh): the band of the k-th score, for one layer.
#pragma once

#include "select.cuh"

constexpr long long kPkMargin = 100000;  // exponents below those of the last round that a band can still meet

// What a sweep needs of a layer whose scores have this power of two: the band in bits of scores. False where there is
// none, or the layer is too far from it.
PK_DEVICE bool pk_band_of(const PaikernSelect &plan, long long exponent, unsigned *least, unsigned *beyond) {
  const PaikernState &state = plan.states[0];
  if (state.stage != kPkStreamed) return false;
  const long long shift = exponent - state.lowest;
  if (shift < 0 || shift > 2 * kPkMargin) {
    plan.stream->failed = 1;  // by whoever finds it: they write the same
    return false;
  }
  // Scores are not negative: their bits rise with their keys.
  const unsigned zero = paikern::ordered_bits(0u), low = pk_narrow(plan, state.low, shift);
  const unsigned high = pk_narrow(plan, state.high + 1, shift);
  *least = low <= zero ? 0u : low - zero;
  *beyond = high <= zero ? 0u : high - zero;
  return true;
}

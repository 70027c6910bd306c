// A selection whose scores are met by the sweep that makes them: a round without a read of its own.
//
//   forecast  before the sweeps: the band in which the k-th score of this round is expected, on the line through the
//             last two over the odds of being kept, twice as far around it as the last guess was wrong
//   sweep     path_vector.cuh: as the adjoint reads a weight, the bits "above the band" and "inside it"
//   collect   the keys inside the band, from those bits: the weights of the few that are set are read once more
//   observe   after the selection: what the k-th score was
//
// A band that misses, or holds too many, costs the ordinary sample and filter, never a wrong mask. Layers that no sweep
// meets (the first one; maps) are read by `collect` as `filter` reads them. All kernels of a selection are launched
// every time; those that are not needed return at once, and nothing is copied to the host.
//
// Bytes moved: 1/4 byte a weight for both kinds of bits, written and read, and a sector of 32 bytes for each weight
// inside the band (1 % of them with a guess as good as after ten rounds). Limit: those sectors. Not yet measured on a
// GPU.
#pragma once

#include "select_band.cuh"
#include "select_filter.cuh"

constexpr double kPkFirstReach = 0.2, kPkLeastReach = 0.002, kPkLargestReach = 2.0;  // of log2

// The key among all layers of 2**log2.
PK_DEVICE unsigned long long pk_key_of_log2(const PaikernSelect &plan, double log2, long long lowest) {
  const double whole = floor(log2);
  const float mantissa = static_cast<float>(exp2(log2 - whole));
  const unsigned key = paikern::ordered_bits(__float_as_uint(mantissa));
  return pk_wide(plan, key, static_cast<long long>(whole) - lowest);
}

// One thread: what is known of earlier rounds makes the band of this one.
extern "C" __global__ void paikern_select_forecast(const PaikernSelect *plan_at) {
  const PaikernSelect &plan = *plan_at;
  PaikernStream &stream = *plan.stream;
  PaikernState &state = plan.states[0];
  const double k = static_cast<double>(plan.k[0]), total = static_cast<double>(plan.rankings[0].total);
  state.above = state.inside = state.equal = state.kth = state.prefix = 0;
  state.need = state.left = state.all = 0;
  state.stage = kPkMissed;
  stream.failed = stream.settled = 0;
  stream.nan = 0;
  stream.guess = 0.0;
  if (stream.points < 2 || k < 1.0 || k >= total) return;
  const double odds = log2(k / (total - k)), step = stream.odds[0] - stream.odds[1];
  const double slope = step == 0.0 ? 0.0 : (stream.log2_kth[0] - stream.log2_kth[1]) / step;
  const double guess = stream.log2_kth[0] + slope * (odds - stream.odds[0]);
  const double reach = fmax(kPkLeastReach, 2.0 * stream.error);
  stream.guess = guess;
  if (reach > kPkLargestReach) return;
  state.lowest = stream.lowest;
  state.low = pk_key_of_log2(plan, guess - reach, state.lowest);
  state.high = pk_key_of_log2(plan, guess + reach, state.lowest);
  state.stage = kPkStreamed;
}

extern "C" __global__ void __launch_bounds__(256) paikern_select_collect(const PaikernSelect *plan) {
  if (plan->states[0].stage == kPkStreamed) pk_filter<3, true>(*plan);
}

// One thread, after the selection.
extern "C" __global__ void paikern_select_observe(const PaikernSelect *plan_at) {
  const PaikernSelect &plan = *plan_at;
  PaikernStream &stream = *plan.stream;
  const PaikernState &state = plan.states[0];
  const double k = static_cast<double>(plan.k[0]), total = static_cast<double>(plan.rankings[0].total);
  // The rank of the smallest positive score without a power of two, see scaled_bits.
  const unsigned long long least = (1ull << (plan.width - 1)) + (23ull << 23) + 1;
  const unsigned long long kth = state.stage == kPkDone ? state.high : state.kth;
  stream.rounds += stream.settled;
  stream.lowest = plan.exponents[0];
  for (long long l = 1; l < plan.layer_count; ++l) {
    stream.lowest = plan.exponents[l] < stream.lowest ? plan.exponents[l] : stream.lowest;
  }
  stream.lowest -= kPkMargin;
  if (k < 1.0 || k >= total || kth < least) {  // nothing to learn from, or the k-th score is not above 0
    stream.points = 0;
    return;
  }
  const unsigned long long bits = kth - least;
  const double mantissa = 1.0 + static_cast<double>(bits & 0x7fffffull) / 8388608.0;
  const double found = static_cast<double>(static_cast<long long>(bits >> 23) - 127 + state.lowest) + log2(mantissa);
  const double wrong = fabs(found - stream.guess);
  stream.error = stream.points < 2 ? kPkFirstReach / 2 : fmax(wrong, stream.error / 2);
  stream.odds[1] = stream.odds[0], stream.log2_kth[1] = stream.log2_kth[0];
  stream.odds[0] = log2(k / (total - k)), stream.log2_kth[0] = found;
  stream.points = stream.points < 2 ? stream.points + 1 : 2;
}

// The loops of the selection that run once per score, compiled for each instruction set.
#pragma once

#include <cstdint>

namespace paikern {

// What a pass does with a score. Comparisons are those of IEEE floats: -0 equals +0, and NaN, for which every
// comparison is false, falls among the candidates of any band: a pass that counts them has looked for NaN for free.
template <class Value>
struct TopkBand {
  Value keep;               // bit: score >= keep; NaN: no bit
  Value low, end;           // candidate: not (score < low) and not (score >= end)
  Value tie_high, tie_low;  // scores equal to these are counted, if `ties`
  bool ties;
};

// Candidates of one thread, in order of position. `room` of them may be taken, and 64 slots lie behind.
template <class Value>
struct TopkFound {
  Value *values;
  uint16_t *at;  // position in the chunk
  int64_t count, room;
};

struct TopkCounts {
  int64_t above, high, low;  // bits set; scores equal to tie_high and tie_low
  bool nan;
};

template <class Value>
struct TopkLoops {
  // values[0 .. count) start at position `first` of their chunk and bit 0 of `bits`, which is written in whole bytes,
  // spare bits zero. Returns false, at once, when there is no room for a candidate.
  bool (*filter)(const Value *values, int64_t count, bool absolute, const TopkBand<Value> &band, int64_t first,
                 uint8_t *bits, TopkFound<Value> *found, TopkCounts *counts);

  // Among the scores equal to `value`: sets the bits of the first `left` and clears the others'. Returns what is left.
  int64_t (*ties)(const Value *values, int64_t count, bool absolute, Value value, int64_t left, uint8_t *bits);

  // Sets the bits of the candidates that are at least `keep`, and of the first `ties` equal to `tie`; returns what is
  // left of `ties`.
  int64_t (*keep)(const Value *values, const uint16_t *at, int64_t count, Value keep, Value tie, int64_t ties,
                  uint8_t *bits);

  // How many are equal to `value`.
  int64_t (*equal)(const Value *values, int64_t count, Value value);

  // The rank-th largest (1-based) of values that are not NaN, and how many are greater. `work` has room for `count` and
  // 64 more.
  Value (*nth)(const Value *values, int64_t count, int64_t rank, Value *work, int64_t *greater);
};

struct TopkInner {
  // out[i] = data[i] as float; `half` is bfloat16 or, if `ieee`, float16.
  void (*widen)(const uint16_t *data, int64_t count, bool ieee, float *out);

  // out[i] = (|w[i]| * a[i]) * g, or (w[i]**2 * a[i]) * g if `square`; w may be out.
  void (*factored)(const float *w, const float *a, float g, bool square, int64_t count, float *out);

  // out[i] = |x[i] * y[i]|; x may be out.
  void (*product)(const float *x, const float *y, int64_t count, float *out);

  // values[i] = -inf where bit i is 0.
  void (*exclude)(const uint8_t *candidates, int64_t count, float *values);

  TopkLoops<float> single;
  TopkLoops<double> twice;
};

extern const TopkInner kTopkPortable, kTopkAvx2, kTopkAvx512;

template <class Value>
const TopkLoops<Value> &topk_loops(const TopkInner &inner);
template <>
inline const TopkLoops<float> &topk_loops<float>(const TopkInner &inner) {
  return inner.single;
}
template <>
inline const TopkLoops<double> &topk_loops<double>(const TopkInner &inner) {
  return inner.twice;
}

}  // namespace paikern

// Scores of a source as float or double: dense or factored, excluded ones as -infinity.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "halves.h"
#include "isa.h"
#include "topk.h"
#include "topk_inner.h"

namespace paikern {

constexpr int64_t kBlock = 512;  // scores decoded at a time: stays in L1

inline const TopkInner &topk_inner() {
  switch (isa()) {
    case Isa::kAvx512:
      return kTopkAvx512;
    case Isa::kAvx2:
      return kTopkAvx2;
    default:
      return kTopkPortable;
  }
}

// Element `start` onwards as float: the storage itself where it is float32, else `buffer`.
inline const float *widen(const TopkInner &inner, const void *data, ScoreType type, int64_t start, int64_t count,
                          float *buffer) {
  switch (type) {
    case ScoreType::kFloat32:
      return static_cast<const float *>(data) + start;
    case ScoreType::kFloat64:
      for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<float>(static_cast<const double *>(data)[start + i]);
      return buffer;
    default:
      inner.widen(static_cast<const uint16_t *>(data) + start, count, type == ScoreType::kFloat16, buffer);
      return buffer;
  }
}

// `count` <= kBlock scores from position `start`, a multiple of 8 unless count is 1; `absolute` is left to the keys.
inline const float *load(const TopkInner &inner, const ScoreSource &s, int64_t start, int64_t count, float *buffer) {
  const float *from = widen(inner, s.data, s.type, start, count, buffer);
  if (s.a != nullptr) {
    int64_t row = start / s.columns, column = start % s.columns;
    for (int64_t done = 0; done < count; ++row, column = 0) {
      const int64_t run = std::min(count - done, s.columns - column);
      inner.factored(from + done, s.a + column, s.g[row], s.power == 2, run, buffer + done);
      done += run;
    }
    from = buffer;
  }
  if (s.candidates != nullptr) {
    if (from != buffer) std::copy(from, from + count, buffer);
    if (count == 1) {
      if (((s.candidates[start >> 3] >> (start & 7)) & 1) == 0) *buffer = -std::numeric_limits<float>::infinity();
    } else {
      inner.exclude(s.candidates + (start >> 3), count, buffer);
    }
    from = buffer;
  }
  return from;
}

// The same in double, for lists that hold a float64 tensor. Factored scores are float32 everywhere.
inline const double *load(const TopkInner &inner, const ScoreSource &s, int64_t start, int64_t count, double *buffer) {
  if (s.type == ScoreType::kFloat64 && s.a == nullptr) {
    std::copy_n(static_cast<const double *>(s.data) + start, count, buffer);
  } else {
    float narrow[kBlock];
    const float *from = load(inner, s, start, count, narrow);
    std::copy_n(from, count, buffer);
  }
  if (s.absolute) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = std::fabs(buffer[i]);
  }
  return buffer;
}

template <class Value>
inline Value load_one(const TopkInner &inner, const ScoreSource &s, int64_t at) {
  Value buffer[8];
  const Value value = *load(inner, s, at, 1, buffer);
  return s.absolute ? std::fabs(value) : value;
}

}  // namespace paikern

// Scores of a source as float or double, a tile at a time: dense in any layout, factored, products, computed tiles;
// excluded ones as -infinity.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "halves.h"
#include "isa.h"
#include "topk.h"
#include "topk_inner.h"

namespace paikern {

constexpr int64_t kTile = 4096;  // scores decoded at a time: 16 KiB of float stay in L1

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

inline int64_t bytes_of(ScoreType type) {
  return type == ScoreType::kFloat64 ? 8 : type == ScoreType::kFloat32 ? 4 : 2;
}

// Whether the last dimension strides over lines of memory that the one before it runs along, as in a transposed matrix.
inline bool runs_across(const ScoreLayout &layout) {
  const size_t dims = layout.sizes.size();
  return dims > 1 && std::abs(layout.strides[dims - 2]) < std::abs(layout.strides[dims - 1]);
}

constexpr int64_t kBand = 16;  // rows that are copied together where the layout runs across: a line of floats

// Copies elements [start, start + count) of a tensor in row-major order.
template <class Word>
void gather(const Word *data, const ScoreLayout &layout, int64_t start, int64_t count, Word *out) {
  const size_t inner = layout.sizes.size() - 1;
  const int64_t step = layout.strides[inner], width = layout.sizes[inner];
  const bool across = runs_across(layout);
  while (count > 0) {
    int64_t left = start, offset = 0, row = 0;
    for (size_t d = inner + 1; d-- > 0;) {
      const int64_t index = left % layout.sizes[d];
      offset += index * layout.strides[d];
      left /= layout.sizes[d];
      if (d + 1 == inner) row = index;
    }
    const Word *from = data + offset;
    const int64_t column = start % width;
    int64_t taken = std::min(count, width - column);
    if (across && column == 0 && count >= 2 * width) {
      const int64_t rows = std::min({kBand, count / width, layout.sizes[inner - 1] - row});
      const int64_t down = layout.strides[inner - 1];
      for (int64_t first = 0; first < width; first += kBand) {
        // Through a block of lines: written one value at a time, the rows would push each other out of the cache.
        const int64_t here = std::min(kBand, width - first);
        Word block[kBand][kBand];
        for (int64_t i = 0; i < here; ++i) {
          for (int64_t r = 0; r < rows; ++r) block[r][i] = from[(first + i) * step + r * down];
        }
        for (int64_t r = 0; r < rows; ++r) std::copy_n(block[r], here, out + r * width + first);
      }
      taken = rows * width;
    } else if (step == 1) {
      std::copy_n(from, taken, out);
    } else {
      for (int64_t i = 0; i < taken; ++i) out[i] = from[i * step];
    }
    start += taken;
    count -= taken;
    out += taken;
  }
}

// Elements [start, start + count) as they are stored: in place where the tensor is contiguous, else in `buffer`.
template <class Word>
const Word *stored(const void *data, const ScoreLayout *layout, int64_t start, int64_t count, Word *buffer) {
  if (layout == nullptr) return static_cast<const Word *>(data) + start;
  gather(static_cast<const Word *>(data), *layout, start, count, buffer);
  return buffer;
}

// The same as float: in place where that is what is stored.
inline const float *as_float(const TopkInner &inner, const void *data, ScoreType type, const ScoreLayout *layout,
                             int64_t start, int64_t count, float *buffer) {
  if (type == ScoreType::kFloat32) return stored(data, layout, start, count, buffer);
  if (type == ScoreType::kFloat64) {
    double wide[kTile];
    const double *from = stored(data, layout, start, count, wide);
    for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<float>(from[i]);
    return buffer;
  }
  uint16_t half[kTile];
  inner.widen(stored(data, layout, start, count, half), count, type == ScoreType::kFloat16, buffer);
  return buffer;
}

// With candidates, those excluded are -infinity, so that magnitudes have to be taken before.
inline bool absolute_later(const ScoreSource &s) { return s.absolute && s.candidates == nullptr; }

template <class Value>
Value *magnitudes(const Value *from, int64_t count, Value *buffer) {
  for (int64_t i = 0; i < count; ++i) buffer[i] = std::fabs(from[i]);
  return buffer;
}

// `count` <= kTile scores from position `start`, a multiple of 16, but for absolute_later. Not for tiles.
inline const float *load(const TopkInner &inner, const ScoreSource &s, int64_t start, int64_t count, float *buffer) {
  const float *from = as_float(inner, s.data, s.type, s.layout, start - s.origin, count, buffer);
  if (s.other != nullptr) {
    float second[kTile];
    inner.product(from, as_float(inner, s.other, s.other_type, s.other_layout, start - s.origin, count, second), count,
                  buffer);
    from = buffer;
  }
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
    if (s.absolute) {
      magnitudes(from, count, buffer);
    } else if (from != buffer) {
      std::copy(from, from + count, buffer);
    }
    inner.exclude(s.candidates + (start >> 3), count, buffer);
    from = buffer;
  }
  return from;
}

// In double, for lists that hold a float64 tensor. Only dense scores are float64; the others are float everywhere.
inline const double *load(const TopkInner &inner, const ScoreSource &s, int64_t start, int64_t count, double *buffer) {
  if (s.type != ScoreType::kFloat64 || s.other != nullptr || s.a != nullptr) {
    float narrow[kTile];
    const float *from = load(inner, s, start, count, narrow);
    std::copy_n(from, count, buffer);
    return buffer;
  }
  const double *from = stored(s.data, s.layout, start - s.origin, count, buffer);
  if (s.candidates == nullptr) return from;
  for (int64_t i = 0; i < count; ++i) {
    const bool candidate = (s.candidates[(start + i) >> 3] >> ((start + i) & 7)) & 1;
    buffer[i] = candidate ? (s.absolute ? std::fabs(from[i]) : from[i]) : -std::numeric_limits<double>::infinity();
  }
  return buffer;
}

// Whether a whole chunk can be read where it lies.
template <class Value>
inline bool in_place(const ScoreSource &s) {
  const ScoreType type = std::is_same_v<Value, float> ? ScoreType::kFloat32 : ScoreType::kFloat64;
  return s.type == type && s.tiles == nullptr && s.other == nullptr && s.a == nullptr && s.candidates == nullptr &&
         s.layout == nullptr;
}

}  // namespace paikern

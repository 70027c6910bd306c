// The bodies behind GatedKernels, compiled once for each instruction set.
//
//   values  f from kept weights, one load a multiply-add
//   pair    the same for two channels, one load for both where both keep a weight
//   paths   g: sums of kept planes, or of the pruned ones taken from the sum of all where more than half is kept
//   quad    the same for four channels, the columns sorted by which of the four list them
//
// All end with scale, shift, branch, gate and the zeros beside the pixels while the sums are in registers.
#pragma once

#include <type_traits>

#include "gated_kernels.h"
#include "path_simd.h"

namespace {

using paikern::GatedBlock;
using paikern::GatedClass;
using paikern::GatedPool;
using paikern::kGatedQuad;

#if defined(__AVX512F__)
constexpr int kMostColumns = 8, kMostRows = 2, kPairColumns = 8;
inline vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vm v_positive(vf a) { return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GT_OQ); }
#elif defined(__AVX2__)
constexpr int kMostColumns = 4, kMostRows = 1, kPairColumns = 2;
inline vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vm v_positive(vf a) { return _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GT_OQ); }
#else
constexpr int kMostColumns = 2, kMostRows = 1, kPairColumns = 1;
inline vf v_max(vf a, vf b) { return v_select(a > b, a, b); }
inline vm v_positive(vf a) { return a > v_zero(); }
#endif

// The accumulators stay in registers only where every call on them is inlined.
#define GATED_LAMBDA __attribute__((always_inline))
#define GATED_INLINE GATED_LAMBDA inline

// A vector is loaded once and stays in its register: GCC makes two multiply-adds from memory of it.
#if defined(__x86_64__)
#define GATED_KEEP(x) asm("" : "+v"(x))
#else
#define GATED_KEEP(x)
#endif

constexpr int kUnit = 16, kParts = kUnit / kLanes;  // vectors a unit

// The bits of one vector of gates.
using GateBits = std::conditional_t<kLanes == 16, uint16_t, uint8_t>;

// The accumulators of a block, row by row.
template <int Columns, int Rows, int Step>
struct Sums {
  static constexpr int kWidth = Columns * kParts, kCount = Rows * kWidth;
  vf at[kCount];

  GATED_INLINE void load(const float *from) {
#pragma GCC unroll 16
    for (int v = 0; v < kCount; ++v) at[v] = v_load(from + v * kLanes);
  }
  GATED_INLINE void store(float *to) const {
#pragma GCC unroll 16
    for (int v = 0; v < kCount; ++v) v_store(to + v * kLanes, at[v]);
  }
  GATED_INLINE void add_to(float *to) const {
#pragma GCC unroll 16
    for (int v = 0; v < kCount; ++v) v_store(to + v * kLanes, v_add(v_load(to + v * kLanes), at[v]));
  }
  GATED_INLINE void add_from(const float *from) {
#pragma GCC unroll 16
    for (int v = 0; v < kCount; ++v) at[v] = v_add(at[v], v_load(from + v * kLanes));
  }
  // Calls take(accumulator, a float of the plane at `src` that it is of) for all.
  template <class Take>
  GATED_INLINE void each(const float *src, int64_t row, Take take) {
    const float *line[Rows];
#pragma GCC unroll 2
    for (int y = 0; y < Rows; ++y) {
      line[y] = src + y * row;
      // Else GCC makes one address a load, not one a line.
      asm("" : "+r"(line[y]));
    }
#pragma GCC unroll 16
    for (int v = 0; v < kCount; ++v) {
      take(at[v], line[v / kWidth] + v % kWidth / kParts * Step * kUnit + v % kParts * kLanes);
    }
  }
  GATED_INLINE void add(const float *base, int64_t row, const int32_t *offsets, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      each(base + offsets[i], row, [](vf &sum, const float *from) GATED_LAMBDA { sum = v_add(sum, v_load(from)); });
    }
  }
  GATED_INLINE void add(const float *base, int64_t row, const int32_t *offsets, const float *values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const vf weight = v_set(values[i]);
      each(base + offsets[i], row,
           [weight](vf &sum, const float *from) GATED_LAMBDA { sum = v_fma(weight, v_load(from), sum); });
    }
  }

  GATED_INLINE void scale_by(vf scale, vf shift) {
#pragma GCC unroll 16
    for (int v = 0; v < kCount; ++v) at[v] = v_fma(at[v], scale, shift);
  }

  // Sums of g that are complete: what they are of all columns, times `scale`.
  GATED_INLINE void count_paths(const GatedBlock &b, vf scale) {
#pragma GCC unroll 16
    for (int v = 0; v < kCount; ++v) {
      // A difference may round to just below 0.
      if (b.all) at[v] = v_max(v_sub(v_load(b.all + v * kLanes), at[v]), v_zero());
      at[v] = v_mul(at[v], scale);
    }
  }

  // Branch, gate and store of channel `channel`; the maximum of `top` and what is stored.
  GATED_INLINE vf finish(const GatedBlock b, int64_t channel, vf top) {  // a copy, else every store may change it
#pragma GCC unroll 16
    for (int v = 0; v < kCount; ++v) {
      const int64_t place = channel * b.channel + v / kWidth * b.row + v % kWidth * kLanes;
      vf sum = at[v];
      if (b.add) sum = v_fma(v_load(b.add + place), v_set(b.add_scale), sum);
      if (b.gate) sum = v_keep(v_mask(reinterpret_cast<const GateBits *>(b.gate)[place / kLanes]), sum);
      const bool unused = v % kWidth / kParts == Columns - 1 && b.beside;
      sum = v_keep(v_mask(unused ? 0 : b.valid[v / kWidth] >> (v % kParts * kLanes)), sum);
      if (b.open) {
        const vm positive = v_positive(sum);
        reinterpret_cast<GateBits *>(b.open)[place / kLanes] = static_cast<GateBits>(v_bits(positive));
        sum = v_keep(positive, sum);
      }
      v_store(b.out + place, sum);
      top = v_max(top, sum);
    }
    return top;
  }
};

// Calls run(accumulators of the shape of the block).
template <int Columns, int Rows, int Step, class Run>
inline void shaped(const GatedBlock &b, Run run) {
  if constexpr (Columns > 1) {
    if (b.columns < Columns) return shaped<Columns / 2, Rows, Step>(b, run);
  }
  if constexpr (Rows > 1) {
    if (b.rows < Rows) return shaped<Columns, Rows - 1, Step>(b, run);
  }
  Sums<Columns, Rows, Step> sums;
  run(sums);
}

inline float highest(vf top) {
  float lane[kLanes], found = 0.0f;
  v_store(lane, top);
  for (int i = 0; i < kLanes; ++i) found = lane[i] > found ? lane[i] : found;
  return found;
}

template <int Step>
void gated_values(const GatedBlock &b, const int32_t *offsets, const float *values, int64_t count, float scale,
                  float shift) {
  shaped<kMostColumns, kMostRows, Step>(b, [&](auto &sums) {
    sums.load(b.from);
    sums.add(b.base, b.base_row, offsets, values, count);
    if (!b.last) return sums.store(b.sums);
    sums.scale_by(v_set(scale), v_set(shift));
    sums.finish(b, 0, v_zero());
  });
}

// The units of a block from row `y` and column `x` on.
template <int Step, int Columns>
inline GatedBlock part_of(const GatedBlock &b, int64_t y, int64_t x) {
  GatedBlock part = b;
  const int64_t at = y * b.row + x * kUnit, held = (y * b.columns + x) * kUnit;
  part.base += y * b.base_row + x * Step * kUnit;
  part.out += at;
  if (b.add) part.add += at;
  if (b.open) part.open += at / kLanes * static_cast<int64_t>(sizeof(GateBits));
  if (b.from == b.sums) part.from += held;
  part.sums += held;
  part.valid[0] = b.valid[y];
  part.beside = b.beside && x + Columns == b.columns;
  return part;
}

template <int Columns, int Step>
void pair_of(const GatedBlock &b, int64_t next, const int32_t *offsets, const float *values, const int32_t *counts,
             const float *scale, const float *shift) {
  Sums<Columns, 1, Step> one, two;
  one.load(b.from);
  two.load(b.from == b.sums ? b.from + next : b.from);
  for (int64_t i = 0; i < counts[0]; ++i) {
    const float *src = b.base + offsets[i];
    const vf first = v_set(values[2 * i]), second = v_set(values[2 * i + 1]);
#pragma GCC unroll 16
    for (int v = 0; v < one.kCount; ++v) {
      vf x = v_load(src + v / kParts * Step * kUnit + v % kParts * kLanes);
      GATED_KEEP(x);
      one.at[v] = v_fma(first, x, one.at[v]);
      two.at[v] = v_fma(second, x, two.at[v]);
    }
  }
  offsets += counts[0];
  values += 2 * counts[0];
  one.add(b.base, b.base_row, offsets, values, counts[1]);
  two.add(b.base, b.base_row, offsets + counts[1], values + counts[1], counts[2]);
  if (!b.last) {
    one.store(b.sums);
    two.store(b.sums + next);
    return;
  }
  one.scale_by(v_set(scale[0]), v_set(shift[0]));
  two.scale_by(v_set(scale[1]), v_set(shift[1]));
  one.finish(b, 0, v_zero());
  two.finish(b, 1, v_zero());
}

template <int Step>
void gated_pair(const GatedBlock &b, const int32_t *offsets, const float *values, const int32_t *counts,
                const float *scale, const float *shift) {
  const int64_t next = int64_t{b.rows} * b.columns * kUnit;
  for (int64_t y = 0; y < b.rows; ++y) {
    int64_t x = 0;
    for (; x + kPairColumns <= b.columns; x += kPairColumns)
      pair_of<kPairColumns, Step>(part_of<Step, kPairColumns>(b, y, x), next, offsets, values, counts, scale, shift);
    for (; x + 2 <= b.columns; x += 2)
      pair_of<2, Step>(part_of<Step, 2>(b, y, x), next, offsets, values, counts, scale, shift);
    for (; x < b.columns; ++x) pair_of<1, Step>(part_of<Step, 1>(b, y, x), next, offsets, values, counts, scale, shift);
  }
}

template <int Step>
float gated_paths(const GatedBlock &b, const int32_t *offsets, int64_t count, float scale) {
  vf top = v_zero();
  shaped<kMostColumns, kMostRows, Step>(b, [&](auto &sums) {
    sums.load(b.from);
    sums.add(b.base, b.base_row, offsets, count);
    if (!b.last) return sums.store(b.sums);
    sums.count_paths(b, v_set(scale));
    top = sums.finish(b, 0, top);
  });
  return b.last ? highest(top) : 0.0f;
}

// The sums of a class go to two places at most: where the first two rows (the last two) both list it, to one that they
// share. Classes of one row come last, and are added to what has come together for it.
template <int Step>
float gated_quad(const GatedBlock &b, const int32_t *offsets, const GatedClass *classes, int64_t count, float scale) {
  vf top = v_zero();
  shaped<kMostColumns, kMostRows, Step>(b, [&](auto &sums) {
    constexpr int64_t kFloats = int64_t{sizeof(sums.at)} / int64_t{sizeof(float)};
    unsigned written = b.from == b.sums ? (1u << kGatedQuad) - 1 : 0;  // the rows, then what two share
    const auto place = [&](int64_t at) GATED_LAMBDA {
      return at < kGatedQuad ? b.sums + at * kFloats : b.shared + (at - kGatedQuad) * kFloats;
    };
    const GatedClass *next = classes, *const end = classes + count;
    for (; next != end && (next->rows & (next->rows - 1)) != 0; offsets += next++->count) {
      sums.load(paikern::kGatedZeros);
      sums.add(b.base, b.base_row, offsets, next->count);
      for (unsigned half = 0; half < 2; ++half) {
        const unsigned rows = next->rows >> (2 * half) & 3;
        if (rows == 0) continue;
        const unsigned at = rows == 3 ? kGatedQuad + half : 2 * half + rows - 1;
        if (written >> at & 1) {
          sums.add_to(place(at));
        } else {
          sums.store(place(at));
          written |= 1u << at;
        }
      }
    }
    for (unsigned r = 0; r < kGatedQuad; ++r) {
      sums.load(written >> r & 1 ? place(r) : paikern::kGatedZeros);
      if (written >> (kGatedQuad + r / 2) & 1) sums.add_from(place(kGatedQuad + r / 2));
      if (next != end && next->rows == 1u << r) {
        sums.add(b.base, b.base_row, offsets, next->count);
        offsets += next++->count;
      }
      if (b.last) {
        sums.count_paths(b, v_set(scale));
        top = sums.finish(b, r, top);
      } else {
        sums.store(place(r));
      }
    }
  });
  return b.last ? highest(top) : 0.0f;
}

template <int Step>
void gated_sum(const GatedBlock &b, const int32_t *offsets, int64_t count) {
  shaped<kMostColumns, kMostRows, Step>(b, [&](auto &sums) {
    sums.load(b.from);
    sums.add(b.base, b.base_row, offsets, count);
    sums.store(b.sums);
  });
}

void gated_pool(const GatedPool &pool, const float *values, const float *by, float *out) {
  const vf none = v_set(-INFINITY);
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) {
    vf best = none, found = none;
    for (int64_t i = 0; i < pool.height; ++i) {
      const vm inside = v_mask(pool.inside[i] >> (p * kLanes));
      for (int64_t j = 0; j < pool.width; ++j) {
        const int64_t at = pool.rows[i] + j * pool.next + p * kLanes;
        const vf candidate = v_select(inside, v_load(by + at), none);
        const vm more = v_above(candidate, best);
        found = v_select(more, v_load(values + at), found);
        best = v_select(more, candidate, best);
      }
    }
    v_store(out + p * kLanes, v_keep(v_mask(pool.valid >> (p * kLanes)), found));
  }
}

void gated_shift(const float *from, float *to, int64_t units, uint32_t bits) {
  for (int64_t unit = 0; unit < units; ++unit) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const int64_t at = unit * kUnit + p * kLanes;
      v_store(to + at, v_keep(v_mask(bits >> (p * kLanes)), v_load(from + at)));
    }
  }
}

template <int Step>
constexpr paikern::GatedKernels make_gated_kernels() {
  return {kMostColumns,       kMostRows,        kParts * static_cast<int>(sizeof(GateBits)),
          gated_values<Step>, gated_pair<Step>, gated_paths<Step>,
          gated_quad<Step>,   gated_sum<Step>,  gated_pool,
          gated_shift};
}

}  // namespace

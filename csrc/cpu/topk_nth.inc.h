// The rank-th largest of some values. Included by topk_inner.inc.h in each instruction set.
//
// Few values stay where they are: bounds between the least and the greatest are probed by counting what reaches them,
// until the rank is pinned. Many are cut down first, to those between two pivots around the rank
// that a small sample gives.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "paikern/keys.h"

namespace {

constexpr int64_t kFew = 1024;

template <class Value>
constexpr Value kInfinite = std::numeric_limits<Value>::infinity();

// Sums in integers as wide as the values, which is what makes vectors of these loops; blocks keep them from
// overflowing.
template <class Value, class Test>
inline int64_t count_where(const Value *values, int64_t count, Test test) {
  using Sum = std::conditional_t<sizeof(Value) == 4, int32_t, int64_t>;
  int64_t total = 0;
  for (int64_t start = 0; start < count; start += int64_t{1} << 30) {
    const int64_t here = std::min(count - start, int64_t{1} << 30);
    Sum sum = 0;
    for (int64_t i = 0; i < here; ++i) sum += test(values[start + i]) ? 1 : 0;
    total += sum;
  }
  return total;
}

template <class Value>
inline int64_t count_at_least(const Value *values, int64_t count, Value bound) {
  return count_where(values, count, [bound](Value v) { return v >= bound; });
}

template <class Value>
int64_t count_equal(const Value *values, int64_t count, Value value) {
  return count_where(values, count, [value](Value v) { return v == value; });
}

// The least of the values that are at least `from`.
template <class Value>
inline Value least(const Value *values, int64_t count, Value from) {
  Value lane[16];
  std::fill(lane, lane + 16, kInfinite<Value>);
  for (int64_t i = 0; i < count; i += 16) {
    for (int64_t j = 0; j < std::min<int64_t>(16, count - i); ++j) {
      const Value v = values[i + j];
      lane[j] = (v >= from) & (v < lane[j]) ? v : lane[j];
    }
  }
  return *std::min_element(lane, lane + 16);
}

// The greatest of the values below `to`.
template <class Value>
inline Value greatest(const Value *values, int64_t count, Value to) {
  Value lane[16];
  std::fill(lane, lane + 16, -kInfinite<Value>);
  for (int64_t i = 0; i < count; i += 16) {
    for (int64_t j = 0; j < std::min<int64_t>(16, count - i); ++j) {
      const Value v = values[i + j];
      lane[j] = (v < to) & (v > lane[j]) ? v : lane[j];
    }
  }
  return *std::max_element(lane, lane + 16);
}

// The least and the greatest.
template <class Value>
inline void extremes(const Value *values, int64_t count, Value *low, Value *high) {
  Value under[16], over[16];
  for (int64_t j = 0; j < 16; ++j) under[j] = over[j] = values[j < count ? j : 0];
  for (int64_t i = 0; i + 16 <= count; i += 16) {
    for (int64_t j = 0; j < 16; ++j) {
      const Value v = values[i + j];
      under[j] = v < under[j] ? v : under[j];
      over[j] = v > over[j] ? v : over[j];
    }
  }
  for (int64_t i = count / 16 * 16; i < count; ++i) {
    under[0] = std::min(under[0], values[i]);
    over[0] = std::max(over[0], values[i]);
  }
  *low = *std::min_element(under, under + 16);
  *high = *std::max_element(over, over + 16);
}

// The rank-th largest, and how many are greater. Not kExact: a value near it, `greater` unused.
template <bool kExact, class Value>
Value pin(const Value *values, int64_t count, int64_t rank, int64_t *greater) {
  using Bits = std::conditional_t<sizeof(Value) == 4, uint32_t, uint64_t>;
  using paikern::ordered_key;
  using paikern::value_of;
  Value first, last;
  extremes(values, count, &first, &last);
  // It is at least value_of(low), as are from_low values, and below value_of(high), which from_high values reach.
  const Bits above_all = ordered_key(last) + 1;
  Bits low = ordered_key(first), high = above_all;
  int64_t from_low = count, from_high = 0;
  for (int step = 0; high - low > 1; ++step) {
    if (from_high == rank - 1) {
      *greater = from_high;
      return high == above_all ? last : greatest(values, count, value_of(high));
    }
    if (from_low == rank) {
      const Value found = least(values, count, value_of(low));
      *greater = found == last ? 0 : count_at_least(values, count, value_of(ordered_key(found) + 1));
      return found;
    }
    // Where the rank lies if values are spread evenly between, or if their logarithms are, or the middle, in turn.
    const double share = (static_cast<double>(from_low - rank) + 0.5) / static_cast<double>(from_low - from_high);
    Bits probe;
    if (step % 3 == 0) {
      const double from = static_cast<double>(value_of(low)), to = static_cast<double>(value_of(high - 1));
      const double between = from + share * (to - from);  // NaN where an infinity is: then the middle
      probe = between == between ? ordered_key(static_cast<Value>(between)) : low + (high - low) / 2;
    } else {
      probe = low + static_cast<Bits>((step % 3 == 1 ? share : 0.5) * static_cast<double>(high - low));
    }
    probe = std::clamp<Bits>(probe, low + 1, high - 1);
    const int64_t reached = count_at_least(values, count, value_of(probe));
    if (!kExact && std::abs(reached - rank) <= 1) return value_of(probe);
    if (reached >= rank) {
      low = probe;
      from_low = reached;
    } else {
      high = probe;
      from_high = reached;
    }
  }
  *greater = from_high;
  return value_of(low);
}

// Two values between which the rank-th largest lies, mostly.
template <class Value>
inline void pivots_around(const Value *values, int64_t count, int64_t rank, Value *low, Value *high) {
  const int64_t sampled = count < 8192 ? 64 : 512;
  Value sample[512];
  for (int64_t j = 0; j < sampled; ++j) sample[j] = values[j * count / sampled];
  const double s = static_cast<double>(sampled), share = static_cast<double>(rank) / static_cast<double>(count);
  const double spread = 2.5 * std::sqrt(s * share * (1 - share)) + 1.0;
  const auto from = static_cast<int64_t>(s * share - spread), to = static_cast<int64_t>(s * share + spread) + 1;
  int64_t greater;
  *high = from < 1 ? kInfinite<Value> : pin<false>(sample, sampled, from, &greater);
  *low = to > sampled ? -kInfinite<Value> : pin<false>(sample, sampled, to, &greater);
}

// Copies the values for which low <= value <= high to `out`, which may be the same place; returns how many. Writes
// whole vectors: in `out` 16 more values may change, and where it is the same place, only such as were read before.
template <class Value>
int64_t copy_between(const Value *values, int64_t count, Value low, Value high, Value *out) {
  int64_t kept = 0, i = 0;
#if defined(__AVX512BW__)
  if constexpr (sizeof(Value) == 4) {
    const __m512 lowest = _mm512_set1_ps(low), highest = _mm512_set1_ps(high);
    for (; i + 16 <= count; i += 16) {
      const __m512 v = _mm512_loadu_ps(values + i);
      const __mmask16 inside =
          _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(v, lowest, _CMP_GE_OQ), v, highest, _CMP_LE_OQ);
      _mm512_storeu_ps(out + kept, _mm512_maskz_compress_ps(inside, v));
      kept += __builtin_popcount(inside);
    }
  } else {
    const __m512d lowest = _mm512_set1_pd(low), highest = _mm512_set1_pd(high);
    for (; i + 8 <= count; i += 8) {
      const __m512d v = _mm512_loadu_pd(values + i);
      const __mmask8 inside =
          _mm512_mask_cmp_pd_mask(_mm512_cmp_pd_mask(v, lowest, _CMP_GE_OQ), v, highest, _CMP_LE_OQ);
      _mm512_storeu_pd(out + kept, _mm512_maskz_compress_pd(inside, v));
      kept += __builtin_popcount(inside);
    }
  }
#endif
  for (; i < count; ++i) {
    const Value value = values[i];
    out[kept] = value;
    kept += (value >= low) & (value <= high);
  }
  return kept;
}

template <class Value>
Value nth_largest(const Value *values, int64_t count, int64_t rank, Value *work, int64_t *greater) {
  *greater = 0;
  const Value *from = values;
  while (count > kFew) {
    Value low, high;
    pivots_around(from, count, rank, &low, &high);
    const int64_t above = count_where(from, count, [high](Value v) { return v > high; });
    const int64_t reached = count_at_least(from, count, low);
    if (rank <= above) {
      low = paikern::value_of(paikern::ordered_key(high) + 1);
      high = kInfinite<Value>;
    } else if (rank > reached) {
      *greater += reached;
      rank -= reached;
      // The next value below; what precedes the key of 0 is that of -0, which is no other value.
      high = paikern::value_of(paikern::ordered_key(low) - (low == 0 ? 2 : 1));
      low = -kInfinite<Value>;
    } else {
      if (reached - above > count / 4) {
        // Far more than the pivots were to leave: one of them is a value that many share, perhaps the one looked for.
        // To copy those would be no progress.
        if (rank <= count_at_least(from, count, high)) {
          *greater += above;
          return high;
        }
        const int64_t beyond = count_where(from, count, [low](Value v) { return v > low; });
        if (rank > beyond) {
          *greater += beyond;
          return low;
        }
      }
      *greater += above;
      rank -= above;
      if (low == high) return low;
    }
    const int64_t before = count;
    count = copy_between(from, count, low, high, work);
    from = work;
    if (count > before - before / 8) break;  // pivots among ties
  }
  int64_t more;
  Value found;
  if (count <= kFew) {
    found = pin<true>(from, count, rank, &more);
  } else {
    std::nth_element(work, work + (rank - 1), work + count, [](Value x, Value y) { return x > y; });
    found = work[rank - 1];
    more = std::count_if(work, work + (rank - 1), [&](Value v) { return v > found; });
  }
  *greater += more;
  return found;
}

}  // namespace

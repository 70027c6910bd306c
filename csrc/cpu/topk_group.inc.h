// 64 scores at a time, as comparisons give them: one 64-bit word. Included by topk_inner.inc.h in each instruction set.
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kGroup = 64;

#if defined(__AVX512BW__)

inline __m512 magnitudes(__m512 v) { return _mm512_abs_ps(v); }
inline __m512d magnitudes(__m512d v) { return _mm512_abs_pd(v); }

template <class Value>
struct Group;

template <>
struct Group<float> {
  __m512 v[4];

  Group(const float *values, bool absolute) {
    for (int j = 0; j < 4; ++j) v[j] = _mm512_loadu_ps(values + 16 * j);
    if (absolute) {
      for (__m512 &part : v) part = magnitudes(part);
    }
  }

  template <int kPredicate>
  uint64_t compare(float with) const {
    const __m512 all = _mm512_set1_ps(with);
    uint64_t word[4];
    for (int j = 0; j < 4; ++j) word[j] = _cvtmask16_u32(_mm512_cmp_ps_mask(v[j], all, kPredicate));
    return word[0] | word[1] << 16 | word[2] << 32 | word[3] << 48;
  }
};

template <>
struct Group<double> {
  __m512d v[8];

  Group(const double *values, bool absolute) {
    for (int j = 0; j < 8; ++j) v[j] = _mm512_loadu_pd(values + 8 * j);
    if (absolute) {
      for (__m512d &part : v) part = magnitudes(part);
    }
  }

  template <int kPredicate>
  uint64_t compare(double with) const {
    const __m512d all = _mm512_set1_pd(with);
    uint64_t word = 0;
    for (int j = 0; j < 8; ++j) {
      word |= static_cast<uint64_t>(_cvtmask8_u32(_mm512_cmp_pd_mask(v[j], all, kPredicate))) << (8 * j);
    }
    return word;
  }
};

constexpr int kAtLeast = _CMP_GE_OQ, kNotBelow = _CMP_NLT_UQ, kEqual = _CMP_EQ_OQ;

#else

#if defined(__AVX2__)
constexpr int kAtLeast = _CMP_GE_OQ, kNotBelow = _CMP_NLT_UQ, kEqual = _CMP_EQ_OQ;
#else
constexpr int kAtLeast = 0, kNotBelow = 1, kEqual = 2;
#endif

template <class Value>
struct Group {
  const Value *v;
  Value buffer[kGroup];

  Group(const Value *values, bool absolute) : v(values) {
    if (absolute) {
      for (int64_t i = 0; i < kGroup; ++i) buffer[i] = values[i] < 0 ? -values[i] : values[i];
      v = buffer;
    }
  }

#if defined(__AVX2__)
  template <int kPredicate>
  uint64_t compare(Value with) const {
    uint64_t word = 0;
    if constexpr (sizeof(Value) == 4) {
      const __m256 all = _mm256_set1_ps(with);
      for (int j = 0; j < 8; ++j) {
        const int byte = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(v + 8 * j), all, kPredicate));
        word |= static_cast<uint64_t>(static_cast<unsigned>(byte)) << (8 * j);
      }
    } else {
      const __m256d all = _mm256_set1_pd(with);
      for (int j = 0; j < 16; ++j) {
        const int nibble = _mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(v + 4 * j), all, kPredicate));
        word |= static_cast<uint64_t>(static_cast<unsigned>(nibble)) << (4 * j);
      }
    }
    return word;
  }
#else
  template <int kPredicate>
  uint64_t compare(Value with) const {
    uint8_t flags[kGroup];
    for (int64_t i = 0; i < kGroup; ++i) {
      if constexpr (kPredicate == kAtLeast) {
        flags[i] = v[i] >= with;
      } else if constexpr (kPredicate == kNotBelow) {
        flags[i] = !(v[i] < with);
      } else {
        flags[i] = v[i] == with;
      }
    }
    uint64_t word = 0;
    for (int j = 0; j < 8; ++j) {
      uint64_t eight;  // the product gathers the lowest bit of each byte in the top byte
      std::memcpy(&eight, flags + 8 * j, 8);
      word |= ((eight * 0x0102040810204080u) >> 56) << (8 * j);
    }
    return word;
  }
#endif
};

#endif

}  // namespace

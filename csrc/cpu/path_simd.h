// Vectors of the widest float unit that the including file is compiled for. One name an operation, so that
// path_kernels.inc.h reads the same for AVX-512 (16 lanes), AVX2 + FMA (8) and the portable build (4, no FMA).
// Include only from path_portable.cpp, path_avx2.cpp and path_avx512.cpp, inside their unnamed namespace rules:
// everything here has internal linkage, so no instruction of a wide build can leak into another file.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 reports the deliberately undefined operands inside its own avx512fintrin.h at every inlined use.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace {

using half_bits = uint16_t;
struct Bf16 {
  half_bits raw;
};
struct Fp16 {
  half_bits raw;
};

inline float to_float(float value) { return value; }

inline float to_float(Bf16 value) {
  const uint32_t word = static_cast<uint32_t>(value.raw) << 16;
  float out;
  std::memcpy(&out, &word, sizeof(out));
  return out;
}

inline float to_float(Fp16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.raw & 0x8000u) << 16;
  const uint32_t exponent = (value.raw >> 10) & 0x1fu;
  const uint32_t mantissa = value.raw & 0x3ffu;
  uint32_t word;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2**-24 is exact in fp32
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    std::memcpy(&word, &magnitude, sizeof(word));
    word |= sign;
  } else if (exponent == 31) {
    word = sign | 0x7f800000u | (mantissa << 13);
  } else {
    word = sign | ((exponent + 112) << 23) | (mantissa << 13);
  }
  float out;
  std::memcpy(&out, &word, sizeof(out));
  return out;
}

#if defined(__AVX512F__)

constexpr int kLanes = 16;
constexpr int kTileRows = 8;  // 8 x 3 accumulators, 3 columns of B, 1 broadcast: 28 of 32 registers
constexpr int kTileVectors = 3;
using vf = __m512;
using vm = __mmask16;

inline vf v_zero() { return _mm512_setzero_ps(); }
inline vf v_set(float x) { return _mm512_set1_ps(x); }
inline vf v_load(const float *p) { return _mm512_loadu_ps(p); }
inline void v_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
inline vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf v_sqrt(vf a) { return _mm512_sqrt_ps(a); }
inline vf v_abs(vf a) { return _mm512_abs_ps(a); }
inline vm v_mask(uint32_t bits) { return static_cast<vm>(bits); }
inline uint32_t v_bits(vm m) { return m; }
inline vf v_keep(vm m, vf a) { return _mm512_maskz_mov_ps(m, a); }
inline vf v_select(vm m, vf a, vf b) { return _mm512_mask_mov_ps(b, m, a); }
inline vm v_nonzero(vf a) { return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_NEQ_UQ); }
inline vm v_isnan(vf a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
inline vm v_above(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline vm v_not_below(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
inline vf v_sign_of(vf s, vf q) {  // sign(s) * q with sign(0) = 0
  const __m512i flipped =
      _mm512_xor_si512(_mm512_castps_si512(q), _mm512_and_si512(_mm512_castps_si512(s), _mm512_set1_epi32(INT32_MIN)));
  return _mm512_maskz_mov_ps(v_nonzero(s), _mm512_castsi512_ps(flipped));
}
inline vf v_weight(const float *p) { return _mm512_loadu_ps(p); }
inline vf v_weight(const Bf16 *p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline vf v_weight(const Fp16 *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }

// Stores the lanes set in `bits` side by side and returns how many; whole vectors are written.
inline int v_compress(uint32_t bits, const int32_t *key, vf value, int32_t *keys, float *values) {
  const __mmask16 m = static_cast<__mmask16>(bits);
  _mm512_storeu_si512(keys, _mm512_maskz_compress_epi32(m, _mm512_loadu_si512(key)));
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(m, value));
  return __builtin_popcount(bits);
}

// Lane i: the next of `kept` where bit i is set, else that of `fill`.
inline vf v_expand(uint32_t bits, const float *kept, vf fill) {
  return _mm512_mask_expand_ps(fill, static_cast<__mmask16>(bits), _mm512_loadu_ps(kept));
}

// Sixteen rows of sixteen floats become their transpose.
inline void v_transpose(vf *r) {
  vf t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  vf u[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 2]);
    const __m512d c = _mm512_castps_pd(t[i + 1]), d = _mm512_castps_pd(t[i + 3]);
    u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    u[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    u[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
    u[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
  }
  for (int i = 0; i < 4; ++i) {
    const vf a = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88), b = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
    const vf c = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
    const vf d = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
    r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
constexpr int kTileRows = 4;  // 4 x 3 accumulators, 3 columns of B, 1 broadcast: all 16 registers
constexpr int kTileVectors = 3;
using vf = __m256;
using vm = __m256;

inline vf v_zero() { return _mm256_setzero_ps(); }
inline vf v_set(float x) { return _mm256_set1_ps(x); }
inline vf v_load(const float *p) { return _mm256_loadu_ps(p); }
inline void v_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
inline vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf v_sqrt(vf a) { return _mm256_sqrt_ps(a); }
inline vf v_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline vm v_mask(uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i hit = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(hit, lane));
}
inline uint32_t v_bits(vm m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
inline vf v_keep(vm m, vf a) { return _mm256_and_ps(m, a); }
inline vf v_select(vm m, vf a, vf b) { return _mm256_blendv_ps(b, a, m); }
inline vm v_nonzero(vf a) { return _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_NEQ_UQ); }
inline vm v_isnan(vf a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
inline vm v_above(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
inline vm v_not_below(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_NLT_UQ); }
inline vf v_sign_of(vf s, vf q) {
  const vf flipped = _mm256_xor_ps(q, _mm256_and_ps(s, _mm256_set1_ps(-0.0f)));
  return _mm256_and_ps(v_nonzero(s), flipped);
}
inline vf v_weight(const float *p) { return _mm256_loadu_ps(p); }
inline vf v_weight(const Bf16 *p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline vf v_weight(const Fp16 *p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }

inline void v_transpose(vf *r) {
  vf t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

#else

constexpr int kLanes = 4;
constexpr int kTileRows = 4;
constexpr int kTileVectors = 2;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vm __attribute__((vector_size(16)));

inline vf v_zero() { return vf{0, 0, 0, 0}; }
inline vf v_set(float x) { return vf{x, x, x, x}; }
inline vf v_load(const float *p) {
  vf a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
inline void v_store(float *p, vf a) { std::memcpy(p, &a, sizeof(a)); }
inline vf v_fma(vf a, vf b, vf c) { return a * b + c; }
inline vf v_add(vf a, vf b) { return a + b; }
inline vf v_sub(vf a, vf b) { return a - b; }
inline vf v_mul(vf a, vf b) { return a * b; }
inline vf v_div(vf a, vf b) { return a / b; }
inline vf v_sqrt(vf a) { return vf{std::sqrt(a[0]), std::sqrt(a[1]), std::sqrt(a[2]), std::sqrt(a[3])}; }
inline vf v_abs(vf a) { return (vf)((vm)a & INT32_MAX); }
inline vm v_mask(uint32_t bits) {
  const int32_t b = static_cast<int32_t>(bits);
  return -(vm{b, b >> 1, b >> 2, b >> 3} & 1);
}
inline uint32_t v_bits(vm m) { return static_cast<uint32_t>((m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8)); }
inline vf v_keep(vm m, vf a) { return (vf)(m & (vm)a); }
inline vf v_select(vm m, vf a, vf b) { return (vf)((m & (vm)a) | (~m & (vm)b)); }
inline vm v_nonzero(vf a) { return a != v_zero(); }
inline vm v_isnan(vf a) { return a != a; }
inline vm v_above(vf a, vf b) { return a > b; }
inline vm v_not_below(vf a, vf b) { return ~(a < b); }
inline vf v_sign_of(vf s, vf q) { return (vf)(v_nonzero(s) & ((vm)q ^ ((vm)s & INT32_MIN))); }
template <class W>
inline vf v_weight(const W *p) {
  return vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}

inline void v_transpose(vf *r) {
  const vf a = r[0], b = r[1], c = r[2], d = r[3];
  r[0] = vf{a[0], b[0], c[0], d[0]};
  r[1] = vf{a[1], b[1], c[1], d[1]};
  r[2] = vf{a[2], b[2], c[2], d[2]};
  r[3] = vf{a[3], b[3], c[3], d[3]};
}

#endif

#if !defined(__AVX512F__)
inline int v_compress(uint32_t bits, const int32_t *key, vf value, int32_t *keys, float *values) {
  float lane[kLanes];
  v_store(lane, value);
  int count = 0;
  for (; bits; bits &= bits - 1, ++count) {
    const int i = __builtin_ctz(bits);
    keys[count] = key[i];
    values[count] = lane[i];
  }
  return count;
}
#endif

#if !defined(__AVX512F__)
inline vf v_expand(uint32_t bits, const float *kept, vf fill) {
  float lane[kLanes];
  v_store(lane, fill);
  for (; bits; bits &= bits - 1) lane[__builtin_ctz(bits)] = *kept++;
  return v_load(lane);
}
#endif

// Lane j: the sum over all lanes of a[j], the same tree for every j and Count; lanes from Count on are of no use.
template <int Count>
inline vf v_fold(const vf *a) {
#if defined(__AVX512F__)
  // Halves onto halves, two vectors at a time: half the shuffles of a transpose. Lane 4 k + m is a[4 k + m].
  if constexpr (Count == 16) {
    vf pair[4][2], quad[4];
    for (int m = 0; m < 4; ++m) {
      for (int h = 0; h < 2; ++h) {
        const vf x = a[8 * h + m], y = a[8 * h + 4 + m];
        pair[m][h] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
      }
      quad[m] = _mm512_add_ps(_mm512_shuffle_f32x4(pair[m][0], pair[m][1], 0x88),
                              _mm512_shuffle_f32x4(pair[m][0], pair[m][1], 0xdd));
    }
    vf twos[2];
    for (int i = 0; i < 2; ++i) {
      const __m512d x = _mm512_castps_pd(quad[2 * i]), y = _mm512_castps_pd(quad[2 * i + 1]);
      twos[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    return _mm512_add_ps(_mm512_shuffle_ps(twos[0], twos[1], 0x88), _mm512_shuffle_ps(twos[0], twos[1], 0xdd));
  }
#endif
  vf block[kLanes];
  for (int i = 0; i < kLanes; ++i) block[i] = a[i < Count ? i : Count - 1];
  v_transpose(block);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) block[i] = v_add(block[i], block[i + width]);
  }
  return block[0];
}

// Four floats.
#if defined(__AVX512F__) || defined(__AVX2__)
using v4 = __m128;
inline v4 v4_set(float x) { return _mm_set1_ps(x); }
inline v4 v4_load(const float *p) { return _mm_loadu_ps(p); }
inline void v4_store(float *p, v4 a) { _mm_storeu_ps(p, a); }
inline v4 v4_fma(v4 a, v4 b, v4 c) { return _mm_fmadd_ps(a, b, c); }
inline v4 v4_add(v4 a, v4 b) { return _mm_add_ps(a, b); }
#else
using v4 = vf;
inline v4 v4_set(float x) { return v_set(x); }
inline v4 v4_load(const float *p) { return v_load(p); }
inline void v4_store(float *p, v4 a) { v_store(p, a); }
inline v4 v4_fma(v4 a, v4 b, v4 c) { return v_fma(a, b, c); }
inline v4 v4_add(v4 a, v4 b) { return v_add(a, b); }
#endif

constexpr int kTileColumns = kLanes * kTileVectors;

// The sum of all lanes, halves folded onto each other: the same tree wherever it is called.
inline float v_sum(vf a) {
  float lane[kLanes];
  v_store(lane, a);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

}  // namespace

// The kernels of path_compact.cpp, compiled once for each instruction set.
#pragma once

#include "path_rows.inc.h"

namespace {

template <int Vectors>
inline void scatter_block(const int32_t *offsets, const float *values, int64_t count, const float *g, float *base) {
  vf factor[Vectors];
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) factor[v] = v_load(g + v * kLanes);
  for (int64_t i = 0; i < count; ++i) {
    const vf weight = v_set(values[i]);
    float *to = base + offsets[i];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) v_store(to + v * kLanes, v_fma(weight, factor[v], v_load(to + v * kLanes)));
  }
}

// base[offsets[i] + n] += values[i] * g[n], one rounding each, i ascending. Planes overlap where two weights differ in
// their tap, so all of one weight comes before the next.
void scatter(const int32_t *offsets, const float *values, int64_t count, const float *g, int64_t width, float *base) {
  const int64_t vectors = width / kLanes;
  if (vectors == 1) return scatter_block<1>(offsets, values, count, g, base);
  if (vectors == 2) return scatter_block<2>(offsets, values, count, g, base);
  if (vectors == 5) return scatter_block<5>(offsets, values, count, g, base);
  for (int64_t i = 0; i < count; ++i) {
    const vf weight = v_set(values[i]);
    float *to = base + offsets[i];
    for (int64_t n = 0; n < width; n += kLanes) v_store(to + n, v_fma(weight, v_load(g + n), v_load(to + n)));
  }
}

template <int Quads>
inline void scatter_quads(const uint16_t *columns, const float *values, int64_t count, const float *g, float *sums) {
  v4 factor[Quads];
  for (int v = 0; v < Quads; ++v) factor[v] = v4_load(g + 4 * v);
  for (int64_t i = 0; i < count; ++i) {
    const v4 weight = v4_set(values[i]);
    float *to = sums + static_cast<int64_t>(columns[i]) * (4 * Quads);
#pragma GCC unroll 4
    for (int v = 0; v < Quads; ++v) v4_store(to + 4 * v, v4_fma(weight, factor[v], v4_load(to + 4 * v)));
  }
}

// sums[columns[i]][n] += values[i] * g[n] for n < width, 4, 8, 12 or 16, one rounding each, i ascending.
void scatter_columns(const uint16_t *columns, const float *values, int64_t count, const float *g, int64_t width,
                     float *sums) {
  if (width == 4) {
    scatter_quads<1>(columns, values, count, g, sums);
  } else if (width == 8) {
    scatter_quads<2>(columns, values, count, g, sums);
  } else if (width == 12) {
    scatter_quads<3>(columns, values, count, g, sums);
  } else if (kLanes < 16) {
    scatter_quads<4>(columns, values, count, g, sums);
  } else {
    const vf factor = v_load(g);
    for (int64_t i = 0; i < count; ++i) {
      float *to = sums + static_cast<int64_t>(columns[i]) * 16;
      v_store(to, v_fma(v_set(values[i]), factor, v_load(to)));
    }
  }
}

template <int Quads>
inline void gather_quads(const uint16_t *columns, const float *values, int64_t count, const float *map, float *sums) {
  for (int64_t i = 0; i < count; ++i) {
    const v4 weight = v4_set(values[i]);
    const float *from = map + static_cast<int64_t>(columns[i]) * (4 * Quads);
    float *to = sums + (columns[i] & (kLanes - 1)) * (4 * Quads);
#pragma GCC unroll 4
    for (int v = 0; v < Quads; ++v) v4_store(to + 4 * v, v4_fma(weight, v4_load(from + 4 * v), v4_load(to + 4 * v)));
  }
}

// out[n] = sum over i of values[i] * map[columns[i]][n] for n < width, 4, 8, 12 or 16: a sum for every lane that
// few_dots has a column in, i ascending, and then the lanes as few_fold adds them. As many chains run side by side.
void gather_columns(const uint16_t *columns, const float *values, int64_t count, const float *map, int64_t width,
                    float *out) {
  float sums[kLanes * 16];
  std::memset(sums, 0, sizeof(float) * static_cast<size_t>(kLanes * width));
  if (width == 4) {
    gather_quads<1>(columns, values, count, map, sums);
  } else if (width == 8) {
    gather_quads<2>(columns, values, count, map, sums);
  } else if (width == 12) {
    gather_quads<3>(columns, values, count, map, sums);
  } else if (kLanes < 16) {
    gather_quads<4>(columns, values, count, map, sums);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      float *to = sums + (columns[i] & (kLanes - 1)) * 16;
      v_store(to, v_fma(v_set(values[i]), v_load(map + static_cast<int64_t>(columns[i]) * 16), v_load(to)));
    }
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half * width; i += 4) {
      v4_store(sums + i, v4_add(v4_load(sums + i), v4_load(sums + half * width + i)));
    }
  }
  std::memcpy(out, sums, sizeof(float) * static_cast<size_t>(width));
}

// out[i] = values[i] * sum over p < width of g[p] * map[columns[i]][p], p ascending: rounds as few_sweep does. Lane i
// is entry i.
void score_columns(const uint16_t *columns, const float *values, int64_t count, const float *map, int64_t width,
                   const float *g, float *out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int left = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    const float *from[kLanes];
    for (int j = 0; j < kLanes; ++j) from[j] = map + static_cast<int64_t>(columns[i + (j < left ? j : 0)]) * width;
    vf sum = v_zero();
#if defined(__AVX512F__)
    if (width < 16) {
      for (int64_t p = 0; p < width; p += 4) {  // four positions of sixteen entries, transposed within each quarter
        vf quad[4];
        for (int r = 0; r < 4; ++r) {
          quad[r] = _mm512_castps128_ps512(_mm_loadu_ps(from[r] + p));
          quad[r] = _mm512_insertf32x4(quad[r], _mm_loadu_ps(from[4 + r] + p), 1);
          quad[r] = _mm512_insertf32x4(quad[r], _mm_loadu_ps(from[8 + r] + p), 2);
          quad[r] = _mm512_insertf32x4(quad[r], _mm_loadu_ps(from[12 + r] + p), 3);
        }
        const vf a = _mm512_unpacklo_ps(quad[0], quad[1]), b = _mm512_unpacklo_ps(quad[2], quad[3]);
        const vf c = _mm512_unpackhi_ps(quad[0], quad[1]), d = _mm512_unpackhi_ps(quad[2], quad[3]);
        sum = v_fma(v_set(g[p]), _mm512_shuffle_ps(a, b, 0x44), sum);
        sum = v_fma(v_set(g[p + 1]), _mm512_shuffle_ps(a, b, 0xee), sum);
        sum = v_fma(v_set(g[p + 2]), _mm512_shuffle_ps(c, d, 0x44), sum);
        sum = v_fma(v_set(g[p + 3]), _mm512_shuffle_ps(c, d, 0xee), sum);
      }
    } else
#endif
    {
      for (int64_t p = 0; p < width; p += kLanes) {
        const int here = static_cast<int>(width - p < kLanes ? width - p : kLanes);
        vf block[kLanes];
        for (int j = 0; j < kLanes; ++j) {
          block[j] = here == kLanes ? v_load(from[j] + p) : v_load_part(from[j] + p, here);
        }
        v_transpose(block);
        for (int n = 0; n < here; ++n) sum = v_fma(v_set(g[p + n]), block[n], sum);
      }
    }
    float lane[kLanes];
    v_store(lane, sum);
    for (int j = 0; j < left; ++j) out[i + j] = values[i + j] * lane[j];
  }
}

// Keeps the entries whose bit first + columns[i] is 1, in order; returns how many.
int64_t filter_kept(uint16_t *columns, float *values, int64_t count, const uint8_t *mask, int64_t bytes,
                    int64_t first) {
  int64_t left = 0, i = 0;
#if defined(__AVX512F__)
  const int64_t word = first >> 5;
  const uint8_t *base = mask + 4 * word;
  const __m512i shift = _mm512_set1_epi32(static_cast<int>(first - 32 * word));
  for (; i + 16 <= count; i += 16) {
    if (((first + columns[i + 15]) >> 5) * 4 + 4 > bytes) break;  // whole words are read
    const __m512i column = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(columns + i)));
    const __m512i at = _mm512_add_epi32(column, shift);
    const __m512i words = _mm512_i32gather_epi32(_mm512_srli_epi32(at, 5), base, 4);
    const __m512i bit = _mm512_sllv_epi32(_mm512_set1_epi32(1), _mm512_and_si512(at, _mm512_set1_epi32(31)));
    const __mmask16 stay = _mm512_test_epi32_mask(words, bit);
    const vf value = v_load(values + i);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(columns + left),
                        _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(stay, column)));
    v_store(values + left, _mm512_maskz_compress_ps(stay, value));
    left += __builtin_popcount(stay);
  }
#else
  (void)bytes;
#endif
  for (; i < count; ++i) {  // no branch: which stay is not to be guessed
    const int64_t at = first + columns[i];
    columns[left] = columns[i];
    values[left] = values[i];
    left += mask[at >> 3] >> (at & 7) & 1;
  }
  return left;
}

}  // namespace

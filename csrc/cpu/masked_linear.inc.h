// The bodies behind MaskedKernels, compiled once for each instruction set.
//
//   products  one index gives `vectors` contiguous vectors of X^T, one fused multiply-add each. Four sums a vector, so
//             that their latency is hidden and the order of a sum does not depend on the width of the panel
//   dots      the same vectors against a row of dY^T in registers; `lanes` sums are folded at a time
//   matvec    gathers of x, `lanes` rows folded at a time
//
// Lines out of L2 bound them: at 4096 columns one takes 0.53 ns in wide panels and 0.6 in narrow ones, 0.24 from L1.
// Tried for short rows, at 41 entries, and slower: rows in the order of their lengths (0.116 to 0.14 ms), a masked tail
// (0.157), panels asked for ahead (0.135), huge pages (the same).
#pragma once

#include <algorithm>

#include "masked_linear_kernels.h"
#include "path_simd.h"

namespace {

using paikern::MaskedKernels;
using paikern::MaskedRows;
using paikern::WeightType;

constexpr int kSums = 4;  // 16-bit columns of a 64-bit load
#if defined(__AVX512F__)
constexpr int kPanelVectors = 4;  // 16 sums of 32 registers
#else
constexpr int kPanelVectors = 2;  // 8 sums of 16 registers
#endif

template <int V>
struct Vectors {
  static constexpr int value = V;
};

template <class Visit>
inline void with_vectors(int64_t vectors, Visit visit) {
  if (vectors == 1) return visit(Vectors<1>{});
  if (vectors == 2) return visit(Vectors<2>{});
#if defined(__AVX512F__)
  if (vectors == 3) return visit(Vectors<3>{});
  return visit(Vectors<4>{});
#endif
}

template <class Visit>
inline void with_type(const void *values, WeightType type, Visit visit) {
  if (type == WeightType::kFloat32) return visit(static_cast<const float *>(values));
  if (type == WeightType::kBfloat16) return visit(static_cast<const Bf16 *>(values));
  visit(static_cast<const Fp16 *>(values));
}

template <class T>
inline void load_some(const T *from, int count, T *to) {
  std::memcpy(to, from, sizeof(T) * static_cast<size_t>(count));
}

// --- layouts -------------------------------------------------------------------------------------

void masked_pack(const float *x, int64_t ldx, int64_t count, int64_t columns, int64_t vectors, float *panel) {
  const int64_t width = vectors * kLanes;
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int wide = static_cast<int>(columns - c < kLanes ? columns - c : kLanes);
    for (int64_t v = 0; v < vectors; ++v) {
      vf block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t row = v * kLanes + i;
        if (row >= count) {
          block[i] = v_zero();
        } else if (wide == kLanes) {
          block[i] = v_load(x + row * ldx + c);
        } else {
          float lane[kLanes] = {};
          load_some(x + row * ldx + c, wide, lane);
          block[i] = v_load(lane);
        }
      }
      v_transpose(block);
      for (int i = 0; i < wide; ++i) v_store(panel + (c + i) * width + v * kLanes, block[i]);
    }
  }
}

void masked_unpack(const float *tile, int64_t vectors, int64_t count, int64_t rows, const float *bias, float *y,
                   int64_t ldy) {
  const int64_t width = vectors * kLanes;
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int high = static_cast<int>(rows - r < kLanes ? rows - r : kLanes);
    vf add = v_zero();
    if (bias) {
      float lane[kLanes] = {};
      load_some(bias + r, high, lane);
      add = v_load(lane);
    }
    for (int64_t v = 0; v * kLanes < count; ++v) {
      vf block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = v_load(tile + (r + (i < high ? i : 0)) * width + v * kLanes);
      v_transpose(block);
      const int64_t left = count - v * kLanes;
      for (int i = 0; i < kLanes && i < left; ++i) {
        float *to = y + (v * kLanes + i) * ldy + r;
        const vf value = bias ? v_add(block[i], add) : block[i];
        if (high == kLanes) {
          v_store(to, value);
        } else {
          float lane[kLanes];
          v_store(lane, value);
          load_some(lane, high, to);
        }
      }
    }
  }
}

// --- panels --------------------------------------------------------------------------------------

template <int V>
void products_of(const MaskedRows &rows, const float *values, const float *panel, bool accumulate, float *tile) {
  constexpr int64_t kWidth = V * kLanes;
  for (int64_t r = 0; r < rows.count; ++r) {
    int64_t i = rows.starts[r * rows.stride];
    const int64_t end = rows.starts[r * rows.stride + rows.span];
    vf sum[kSums][V];
#pragma GCC unroll 16
    for (int s = 0; s < kSums; ++s) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[s][v] = v_zero();
    }
    for (; i + kSums <= end; i += kSums) {
      uint64_t some;  // kSums columns in one load: 8 % less time with one vector
      std::memcpy(&some, rows.columns + i, sizeof(some));
#pragma GCC unroll 16
      for (int s = 0; s < kSums; ++s) {
        const float *x = panel + ((some >> (16 * s)) & 0xffffu) * kWidth;
        const vf value = v_set(values[i + s]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sum[s][v] = v_fma(value, v_load(x + v * kLanes), sum[s][v]);
      }
    }
    for (; i < end; ++i) {
      const float *x = panel + rows.columns[i] * kWidth;
      const vf value = v_set(values[i]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[0][v] = v_fma(value, v_load(x + v * kLanes), sum[0][v]);
    }
    float *to = tile + r * kWidth;
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const vf total = v_add(v_add(sum[0][v], sum[1][v]), v_add(sum[2][v], sum[3][v]));
      v_store(to + v * kLanes, accumulate ? v_add(v_load(to + v * kLanes), total) : total);
    }
  }
}

void masked_products(const MaskedRows &rows, const float *values, const float *panel, int64_t vectors, bool accumulate,
                     float *tile) {
  with_vectors(vectors, [&](auto size) { products_of<decltype(size)::value>(rows, values, panel, accumulate, tile); });
}

template <int V>
void dots_of(const MaskedRows &rows, const float *g, const float *panel, bool accumulate, float *out) {
  constexpr int64_t kWidth = V * kLanes;
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t end = rows.starts[r * rows.stride + rows.span];
    vf row[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) row[v] = v_load(g + r * kWidth + v * kLanes);
    for (int64_t i = rows.starts[r * rows.stride]; i < end; i += kLanes) {
      const int left = static_cast<int>(end - i < kLanes ? end - i : kLanes);
      vf sum[kLanes];
      const auto dot = [&](int64_t entry) {
        const float *x = panel + rows.columns[entry] * kWidth;
        vf total = v_fma(row[0], v_load(x), v_zero());
#pragma GCC unroll 16
        for (int v = 1; v < V; ++v) total = v_fma(row[v], v_load(x + v * kLanes), total);
        return total;
      };
      if (left == kLanes) {
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) sum[j] = dot(i + j);
        const vf total = v_fold<kLanes>(sum);
        v_store(out + i, accumulate ? v_add(v_load(out + i), total) : total);
      } else {
        for (int j = 0; j < kLanes; ++j) sum[j] = j < left ? dot(i + j) : v_zero();
        float lane[kLanes];
        v_store(lane, v_fold<kLanes>(sum));
        for (int j = 0; j < left; ++j) out[i + j] = accumulate ? out[i + j] + lane[j] : lane[j];
      }
    }
  }
}

void masked_dots(const MaskedRows &rows, const float *g, const float *panel, int64_t vectors, bool accumulate,
                 float *out) {
  with_vectors(vectors, [&](auto size) { dots_of<decltype(size)::value>(rows, g, panel, accumulate, out); });
}

// --- gathers -------------------------------------------------------------------------------------

inline vf gather(const float *x, const uint16_t *columns) {
#if defined(__AVX512F__)
  const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(columns));
  return _mm512_i32gather_ps(_mm512_cvtepu16_epi32(some), x, 4);
#elif defined(__AVX2__)
  const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i *>(columns));
  return _mm256_i32gather_ps(x, _mm256_cvtepu16_epi32(some), 4);
#else
  return vf{x[columns[0]], x[columns[1]], x[columns[2]], x[columns[3]]};
#endif
}

// The last `left` < kLanes entries of a row: nothing is read behind them, lanes from `left` on are 0.
#if defined(__AVX512F__)
// Masked loads: 2.4 times as fast as copies at 41 entries a row.
inline vf weights_tail(const float *p, int left) { return _mm512_maskz_loadu_ps(v_mask((1u << left) - 1), p); }
inline __m256i halves_tail(const void *p, int left) {
  return _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << left) - 1), p);
}
inline vf weights_tail(const Bf16 *p, int left) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves_tail(p, left)), 16));
}
inline vf weights_tail(const Fp16 *p, int left) { return _mm512_cvtph_ps(halves_tail(p, left)); }
inline vf gather_tail(const float *x, const uint16_t *columns, int left) {
  const __m512i index = _mm512_cvtepu16_epi32(halves_tail(columns, left));
  return _mm512_mask_i32gather_ps(v_zero(), v_mask((1u << left) - 1), index, x, 4);
}
#else
template <class W>
inline vf weights_tail(const W *p, int left) {
  float lane[kLanes] = {};
  for (int i = 0; i < left; ++i) lane[i] = to_float(p[i]);
  return v_load(lane);
}
inline vf gather_tail(const float *x, const uint16_t *columns, int left) {
  float lane[kLanes] = {};
  for (int i = 0; i < left; ++i) lane[i] = x[columns[i]];
  return v_load(lane);
}
#endif

constexpr int64_t kAhead = 768;

template <int Batch, class W>
void matvec_of(const MaskedRows &rows, const W *values, const float *x, int64_t ldx, const float *bias, bool accumulate,
               float *y, int64_t ldy) {
  for (int64_t r = 0; r < rows.count; r += kLanes) {
    const int high = static_cast<int>(rows.count - r < kLanes ? rows.count - r : kLanes);
    vf total[Batch][kLanes];
    for (int j = 0; j < kLanes; ++j) {
      vf sum[2][Batch];
      for (auto &some : sum) {
        for (vf &s : some) s = v_zero();
      }
      int64_t i = 0, end = 0;
      if (j < high) {
        i = rows.starts[(r + j) * rows.stride];
        end = rows.starts[(r + j) * rows.stride + rows.span];
      }
      for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
        // Asked for early: out of memory, at density 0.1 and 4096 x 4096, 0.55 to 0.42 ms (2048 ahead is no better).
        __builtin_prefetch(values + i + kAhead);
        __builtin_prefetch(values + i + kAhead + kLanes);
        __builtin_prefetch(rows.columns + i + kAhead);
#pragma GCC unroll 2
        for (int s = 0; s < 2; ++s) {
          const vf value = v_weight(values + i + s * kLanes);
#pragma GCC unroll 2
          for (int b = 0; b < Batch; ++b) {
            sum[s][b] = v_fma(value, gather(x + b * ldx, rows.columns + i + s * kLanes), sum[s][b]);
          }
        }
      }
      if (i + kLanes <= end) {
        const vf value = v_weight(values + i);
        for (int b = 0; b < Batch; ++b) sum[0][b] = v_fma(value, gather(x + b * ldx, rows.columns + i), sum[0][b]);
        i += kLanes;
      }
      if (i < end) {
        const int left = static_cast<int>(end - i);
        const vf value = weights_tail(values + i, left);
        for (int b = 0; b < Batch; ++b) {
          sum[1][b] = v_fma(value, gather_tail(x + b * ldx, rows.columns + i, left), sum[1][b]);
        }
      }
      for (int b = 0; b < Batch; ++b) total[b][j] = v_add(sum[0][b], sum[1][b]);
    }
    for (int b = 0; b < Batch; ++b) {
      float lane[kLanes];
      v_store(lane, v_fold<kLanes>(total[b]));
      float *to = y + b * ldy + r;
      for (int j = 0; j < high; ++j) {
        const float before = accumulate ? to[j] : (bias ? bias[r + j] : 0.0f);
        to[j] = before + lane[j];
      }
    }
  }
}

void masked_matvec(const MaskedRows &rows, const void *values, WeightType type, const float *x, int64_t ldx,
                   int64_t batch, const float *bias, bool accumulate, float *y, int64_t ldy) {
  with_type(values, type, [&](const auto *typed) {
    if (batch == 1) {
      matvec_of<1>(rows, typed, x, ldx, bias, accumulate, y, ldy);
    } else {
      matvec_of<2>(rows, typed, x, ldx, bias, accumulate, y, ldy);
    }
  });
}

void masked_collect(const void *values, WeightType type, const int32_t *source, int64_t count, float *out) {
  with_type(values, type, [&](const auto *typed) {
    if (source) {
      for (int64_t i = 0; i < count; ++i) out[i] = to_float(typed[source[i]]);
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = to_float(typed[i]);
    }
  });
}

void masked_expand(const uint8_t *bits, int64_t bytes, int64_t start, int64_t columns, const float *values,
                   const float *end, float *row) {
  constexpr int kWord = 48;  // bits that one load has wherever it starts, a multiple of every vector length
  for (int64_t c = 0; c < columns; c += kWord) {
    const int count = static_cast<int>(std::min<int64_t>(kWord, columns - c));
    const uint64_t word = paikern::mask_bits(bits, bytes, start + c, count);
#if defined(__AVX512F__)
    for (int i = 0; i < count; i += kLanes) {
      const uint32_t some = static_cast<uint32_t>(word >> i) & 0xffffu;
      const int kept = __builtin_popcount(some);
      const vf next = end - values >= kLanes ? v_load(values) : _mm512_maskz_loadu_ps(v_mask((1u << kept) - 1), values);
      const vf spread = _mm512_maskz_expand_ps(v_mask(some), next);
      if (count - i >= kLanes) {
        v_store(row + c + i, spread);
      } else {
        _mm512_mask_storeu_ps(row + c + i, v_mask((1u << (count - i)) - 1), spread);
      }
      values += kept;
    }
#else
    (void)end;
    std::memset(row + c, 0, sizeof(float) * static_cast<size_t>(count));
    for (uint64_t left = word; left; left &= left - 1) row[c + __builtin_ctzll(left)] = *values++;
#endif
  }
}

constexpr MaskedKernels make_masked_kernels(const char *name) {
  return {name,        kLanes,        kPanelVectors,  masked_pack,  masked_unpack, masked_products,
          masked_dots, masked_matvec, masked_collect, masked_expand};
}

}  // namespace

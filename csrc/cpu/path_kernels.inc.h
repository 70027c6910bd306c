// The bodies behind PathKernels (path_kernels.h), compiled once for each instruction set.
//
//   multiply        C += A B                   24 accumulators, 2 fused multiply-adds a cycle on AVX-512
//   gather          the same sums over kept weights only; both add in ascending k with one rounding each, so dense
//                   and sparse plans agree bit for bit and every column rounds alike wherever it sits in a tile
//   scatter         the adjoint of gather: rows add to planes in ascending order, one rounding each
//   matvec_*        one read of W, nothing else from memory (8192 x 8192 fp32: 1.0-1.1x of the time to read it)
//   dpai_row        s (and Adam's m, v) read and written once; q comes from the tile in L2 and is never stored
//
// Source: DPaI poster, update of section 4 and kernel flags; the tile shape follows Goto and van de Geijn (2008).
#pragma once

#include "path_kernels.h"
#include "path_simd.h"

namespace {

using paikern::DpaiCounts;
using paikern::DpaiRow;
using paikern::DpaiRule;
using paikern::kDepth;
using paikern::mask_bits;
using paikern::WeightType;
using paikern::WeightView;

template <int Power, class W>
inline vf magnitude(const W *w) {
  if constexpr (Power == 0) {
    return v_set(1.0f);
  } else {
    const vf a = v_weight(w);
    return Power == 1 ? v_abs(a) : v_mul(a, a);
  }
}

// |W|**Power of up to kLanes weights, the missing lanes 0.
template <int Power, class W>
inline vf magnitude_tail(const W *w, int count) {
  if constexpr (Power == 0) {
    return v_keep(v_mask((1u << count) - 1), v_set(1.0f));
  } else {
    W padded[kLanes] = {};
    std::memcpy(padded, w, sizeof(W) * static_cast<size_t>(count));
    return magnitude<Power>(padded);
  }
}

template <int Value>
struct Int {
  static constexpr int value = Value;
};

// Calls visit(Int<power>, typed weight pointer) for the run-time type and power of w.
template <class Visit>
inline void with_weights(const WeightView &w, Visit visit) {
  const auto typed = [&](const auto *data) {
    if (w.power == 1) {
      visit(Int<1>{}, data);
    } else {
      visit(Int<2>{}, data);
    }
  };
  if (w.power == 0) {
    visit(Int<0>{}, static_cast<const float *>(nullptr));
  } else if (w.type == WeightType::kFloat32) {
    typed(static_cast<const float *>(w.data));
  } else if (w.type == WeightType::kBfloat16) {
    typed(static_cast<const Bf16 *>(w.data));
  } else {
    typed(static_cast<const Fp16 *>(w.data));
  }
}

void decode(const WeightView &w, int64_t start, int64_t count, float *dst) {
  const int64_t bytes = (w.numel + 7) / 8;
  with_weights(w, [&](auto power, const auto *data) {
    constexpr int kPower = decltype(power)::value;
    const auto *src = kPower == 0 ? data : data + start;
    int64_t i = 0;
    if (w.mask && (start & 7) == 0) {  // sixty-four bits at a time
      for (; i + 64 <= count && ((start + i) >> 3) + 8 <= bytes; i += 64) {
        uint64_t bits;
        std::memcpy(&bits, w.mask + ((start + i) >> 3), 8);
#pragma GCC unroll 4
        for (int j = 0; j < 64; j += kLanes, bits >>= kLanes) {
          const uint32_t lanes = static_cast<uint32_t>(bits) & static_cast<uint32_t>((uint64_t{1} << kLanes) - 1);
          v_store(dst + i + j, v_keep(v_mask(lanes), magnitude<kPower>(kPower == 0 ? src : src + i + j)));
        }
      }
    }
    for (; i < count; i += kLanes) {
      const int64_t left = count - i;
      const auto *p = kPower == 0 ? src : src + i;
      vf value = left >= kLanes ? magnitude<kPower>(p) : magnitude_tail<kPower>(p, static_cast<int>(left));
      if (w.mask) {
        value = v_keep(v_mask(static_cast<uint32_t>(mask_bits(w.mask, bytes, start + i, kLanes))), value);
      }
      v_store(dst + i, value);
    }
  });
}

float maximum(const float *values, int64_t count) {
  if (count == 0) return 0.0f;
  vf top[4];
  uint32_t nan = 0;
  for (vf &lane : top) lane = v_set(values[0]);
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vf value = v_load(values + i + j * kLanes);
      nan |= v_bits(v_isnan(value));
      top[j] = v_select(v_above(value, top[j]), value, top[j]);
    }
  }
  float lane[4 * kLanes], best = values[0];
  for (int j = 0; j < 4; ++j) v_store(lane + j * kLanes, top[j]);
  for (const float value : lane) best = value > best ? value : best;
  for (; i < count; ++i) {
    nan |= values[i] != values[i];
    best = values[i] > best ? values[i] : best;
  }
  return nan || best != best ? std::nanf("") : best;
}

int64_t count_bits(const uint8_t *mask, int64_t bytes) {
  int64_t bits = 0, i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, mask + i, 8);
    bits += __builtin_popcountll(word);
  }
  for (; i < bytes; ++i) bits += __builtin_popcount(mask[i]);
  return bits;
}

void pack_columns(const float *base, const int64_t *offset, int64_t depth, int64_t width, float *dst) {
  for (int64_t n = 0; n < width; n += kTileColumns) {
    const int64_t vectors = (width - n < kTileColumns ? width - n : kTileColumns) / kLanes;
    for (int64_t k = 0; k < depth; ++k) {
      const float *src = base + offset[k] + n;
      for (int64_t v = 0; v < vectors; ++v) v_store(dst + v * kLanes, v_load(src + v * kLanes));
      dst += kTileColumns;
    }
  }
}

// The columns of a tile for one reduction index: packed, or where the planes lie.
struct PackedColumns {
  const float *b;
  const float *at(int64_t k) const { return b + k * kTileColumns; }
};

struct PlaneColumns {
  const float *base;
  const int64_t *offset;
  const float *at(int64_t k) const { return base + offset[k]; }
};

template <int Vectors, bool DepthMajor, class Columns>
inline void multiply_tile(const float *a, Columns b, int64_t depth, float *c, int64_t ldc, bool accumulate) {
  vf sum[kTileRows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) sum[r][v] = accumulate ? v_load(c + r * ldc + v * kLanes) : v_zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    vf column[Vectors];
    const float *line = b.at(k);
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) column[v] = v_load(line + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const vf weight = v_set(DepthMajor ? a[k * kTileRows + r] : a[r * kDepth + k]);
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) sum[r][v] = v_fma(weight, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) v_store(c + r * ldc + v * kLanes, sum[r][v]);
  }
}

// `columns(n)` are those of the tile that starts at column n.
template <bool DepthMajor, class Tile>
inline void multiply_tiles(const float *a, int64_t panels, Tile columns, int64_t width, int64_t depth, float *c,
                           int64_t ldc, bool accumulate) {
  for (int64_t n = 0; n < width; n += kTileColumns) {
    const int64_t vectors = (width - n < kTileColumns ? width - n : kTileColumns) / kLanes;
    for (int64_t p = 0; p < panels; ++p) {
      const float *panel = a + p * kTileRows * kDepth;
      float *tile = c + p * kTileRows * ldc + n;
      const auto b = columns(n);
      if (vectors == 3) {
        multiply_tile<3, DepthMajor>(panel, b, depth, tile, ldc, accumulate);
      } else if (vectors == 2) {
        multiply_tile<2, DepthMajor>(panel, b, depth, tile, ldc, accumulate);
      } else {
        multiply_tile<1, DepthMajor>(panel, b, depth, tile, ldc, accumulate);
      }
    }
  }
}

template <class Tile>
inline void multiply_columns(const float *a, bool depth_major, int64_t panels, Tile columns, int64_t width,
                             int64_t depth, float *c, int64_t ldc, bool accumulate) {
  if (depth_major) {
    multiply_tiles<true>(a, panels, columns, width, depth, c, ldc, accumulate);
  } else {
    multiply_tiles<false>(a, panels, columns, width, depth, c, ldc, accumulate);
  }
}

void multiply(const float *a, bool depth_major, int64_t panels, const float *b, int64_t width, int64_t depth, float *c,
              int64_t ldc, bool accumulate) {
  const auto columns = [b, depth](int64_t n) { return PackedColumns{b + n * depth}; };
  multiply_columns(a, depth_major, panels, columns, width, depth, c, ldc, accumulate);
}

void multiply_planes(const float *a, bool depth_major, int64_t panels, const float *base, const int64_t *offset,
                     int64_t width, int64_t depth, float *c, int64_t ldc, bool accumulate) {
  const auto columns = [base, offset](int64_t n) { return PlaneColumns{base + n, offset}; };
  multiply_columns(a, depth_major, panels, columns, width, depth, c, ldc, accumulate);
}

int64_t list_kept(const WeightView &w, int64_t start, int64_t count, const int32_t *key, int32_t *keys, float *values) {
  const int64_t bytes = (w.numel + 7) / 8;
  int64_t found = 0;
  with_weights(w, [&](auto power, const auto *data) {
    constexpr int kPower = decltype(power)::value;
    const auto *src = kPower == 0 ? data : data + start;
    for (int64_t i = 0; i < count; i += 64) {
      const int left = static_cast<int>(count - i < 64 ? count - i : 64);
      uint64_t bits = left == 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
      if (w.mask) {
        bits &= mask_bits(w.mask, bytes, start + i, 32) | mask_bits(w.mask, bytes, start + i + 32, 32) << 32;
      }
      // Only a whole empty word of weights is skipped: to branch on every vector costs more than to read them.
      if (kPower != 0 && bits == 0) continue;
      for (int j = 0; j < left; j += kLanes, bits >>= kLanes) {
        const int lanes = left - j < kLanes ? left - j : kLanes;
        const auto *p = kPower == 0 ? src : src + i + j;
        const vf value = lanes == kLanes ? magnitude<kPower>(p) : magnitude_tail<kPower>(p, lanes);
        const uint32_t group = static_cast<uint32_t>(bits) & static_cast<uint32_t>((uint64_t{1} << kLanes) - 1);
        found += v_compress(group, key + i + j, value, keys + found, values + found);
      }
    }
  });
  return found;
}

template <int Vectors>
inline void gather_block(const int32_t *offsets, const float *values, int64_t count, const float *base, float *c) {
  vf sum[Vectors];
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) sum[v] = v_zero();
  for (int64_t i = 0; i < count; ++i) {
    const vf weight = v_set(values[i]);
    const float *src = base + offsets[i];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[v] = v_fma(weight, v_load(src + v * kLanes), sum[v]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) v_store(c + v * kLanes, sum[v]);
}

void gather(const int32_t *offsets, const float *values, int64_t count, const float *base, int64_t width, float *c) {
  int64_t n = 0;
  for (; n + 8 * kLanes <= width; n += 8 * kLanes) gather_block<8>(offsets, values, count, base + n, c + n);
  for (; n + 4 * kLanes <= width; n += 4 * kLanes) gather_block<4>(offsets, values, count, base + n, c + n);
  for (; n + 2 * kLanes <= width; n += 2 * kLanes) gather_block<2>(offsets, values, count, base + n, c + n);
  for (; n < width; n += kLanes) gather_block<1>(offsets, values, count, base + n, c + n);
}

void score(const WeightView &w, int64_t start, int64_t count, const float *q, float pruned, float *out) {
  const int64_t bytes = (w.numel + 7) / 8;
  const vf fill = v_set(pruned);
  with_weights(w, [&](auto power, const auto *data) {
    constexpr int kPower = decltype(power)::value;
    for (int64_t i = 0; i < count; i += kLanes) {
      const int left = static_cast<int>(count - i < kLanes ? count - i : kLanes);
      const auto *p = kPower == 0 ? data : data + start + i;
      vf value = left == kLanes ? magnitude<kPower>(p) : magnitude_tail<kPower>(p, left);
      value = v_mul(value, v_load(q + i));
      if (w.mask) {
        value = v_select(v_mask(static_cast<uint32_t>(mask_bits(w.mask, bytes, start + i, kLanes))), value, fill);
      }
      if (left == kLanes) {
        v_store(out + i, value);
      } else {
        float lane[kLanes];
        v_store(lane, value);
        std::memcpy(out + i, lane, sizeof(float) * static_cast<size_t>(left));
      }
    }
  });
}

}  // namespace

#include "dpai_row.inc.h"
#include "path_compact.inc.h"
#include "path_few.inc.h"
#include "path_matvec.inc.h"
#include "path_outer.inc.h"
#include "path_sweep.inc.h"

namespace {

constexpr paikern::PathKernels make_path_kernels(const char *name) {
  return {name,           kLanes,        kTileRows,       kTileColumns,    decode,      count_bits,     fill_rows,
          write_rows,     pack_columns,  multiply,        multiply_planes, list_kept,   gather,         scatter,
          gather_columns, score_columns, scatter_columns, filter_kept,     matvec_rows, matvec_columns, sweep_rows,
          score,          pack_lanes,    outer,           interleave,      dots,        expand,         few_dots,
          few_fold,       few_sweep,     maximum,         dpai_row};
}

}  // namespace

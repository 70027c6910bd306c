// y = |W|**p x and x' = (|W|**p)^T g for 1 to 4 vectors: bound by the one read of W. Included by path_kernels.inc.h.
//
// Rows: four running sums a row and vector, whole groups without a kept weight skipped, folded in a fixed tree.
// Columns: four rows a pass over a partial row that stays in L1; the caller fixes the row ranges and adds the partial
// tables in order, so the result does not depend on the number of threads.
#pragma once

namespace {

constexpr int kGroup = 4 * kLanes;  // weights a step: one mask word of 64 bits on AVX-512

template <int Power, bool Masked, int Batch, class W>
inline void matvec_row(const W *w, const WeightView &view, int64_t start, int64_t columns, const float *x, float *out,
                       int64_t ldo) {
  const int64_t bytes = (view.numel + 7) / 8;
  constexpr int kSums = Batch == 1 ? 4 : 2;
  vf sum[Batch][kSums];
  for (auto &row : sum) {
    for (auto &s : row) s = v_zero();
  }
  int64_t j = 0;
  for (; j + kGroup <= columns; j += kGroup) {
    uint64_t kept = ~uint64_t{0};
    if constexpr (Masked) {
      kept = mask_bits(view.mask, bytes, start + j, kGroup / 2);
      kept |= mask_bits(view.mask, bytes, start + j + kGroup / 2, kGroup / 2) << (kGroup / 2);
      if (kept == 0) continue;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      vf value = magnitude<Power>(Power == 0 ? w : w + j + i * kLanes);
      if constexpr (Masked) value = v_keep(v_mask(static_cast<uint32_t>(kept >> (i * kLanes))), value);
#pragma GCC unroll 4
      for (int b = 0; b < Batch; ++b) {
        sum[b][i % kSums] = v_fma(value, v_load(x + b * columns + j + i * kLanes), sum[b][i % kSums]);
      }
    }
  }
  for (; j < columns; j += kLanes) {
    const int left = static_cast<int>(columns - j < kLanes ? columns - j : kLanes);
    vf value = magnitude_tail<Power>(Power == 0 ? w : w + j, left);
    if constexpr (Masked) {
      value = v_keep(v_mask(static_cast<uint32_t>(mask_bits(view.mask, bytes, start + j, kLanes))), value);
    }
    for (int b = 0; b < Batch; ++b) {
      float lane[kLanes] = {};
      std::memcpy(lane, x + b * columns + j, sizeof(float) * static_cast<size_t>(left));
      sum[b][0] = v_fma(value, v_load(lane), sum[b][0]);
    }
  }
  for (int b = 0; b < Batch; ++b) {
    vf total = v_add(sum[b][0], sum[b][1]);
    if constexpr (kSums == 4) total = v_add(total, v_add(sum[b][2], sum[b][3]));
    out[b * ldo] = v_sum(total);
  }
}

template <class Visit>
inline void with_batch(int64_t batch, Visit visit) {
  if (batch == 1) {
    visit(Int<1>{});
  } else if (batch == 2) {
    visit(Int<2>{});
  } else if (batch == 3) {
    visit(Int<3>{});
  } else {
    visit(Int<4>{});
  }
}

void matvec_rows(const WeightView &view, int64_t columns, int64_t first, int64_t last, const float *x, int64_t batch,
                 float *out, int64_t ldo) {
  with_weights(view, [&](auto power, const auto *data) {
    constexpr int kPower = decltype(power)::value;
    with_batch(batch, [&](auto size) {
      constexpr int kBatch = decltype(size)::value;
      for (int64_t r = first; r < last; ++r) {
        const auto *row = kPower == 0 ? data : data + r * columns;
        if (view.mask) {
          matvec_row<kPower, true, kBatch>(row, view, r * columns, columns, x, out + r, ldo);
        } else {
          matvec_row<kPower, false, kBatch>(row, view, r * columns, columns, x, out + r, ldo);
        }
      }
    });
  });
}

// `Rows` rows at once over columns j0 .. j1; partial is read and written once for all of them.
template <int Power, bool Masked, int Batch, int Rows, class W>
inline void matvec_column_rows(const W *w, const WeightView &view, int64_t columns, int64_t row, int64_t j0, int64_t j1,
                               const float *g, int64_t ldg, float *partial, int64_t ldp) {
  const int64_t bytes = (view.numel + 7) / 8;
  vf factor[Batch][Rows];
  for (int b = 0; b < Batch; ++b) {
    for (int r = 0; r < Rows; ++r) factor[b][r] = v_set(g[b * ldg + row + r]);
  }
  for (int64_t j = j0; j < j1; j += kLanes) {
    const int left = static_cast<int>(j1 - j < kLanes ? j1 - j : kLanes);
    vf value[Rows];
    uint32_t any = 0;
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const int64_t index = (row + r) * columns + j;
      uint32_t kept = ~0u;
      if constexpr (Masked) {
        kept = static_cast<uint32_t>(mask_bits(view.mask, bytes, index, kLanes));
        any |= kept;
      }
      const W *p = Power == 0 ? w : w + index;
      value[r] = left == kLanes ? magnitude<Power>(p) : magnitude_tail<Power>(p, left);
      if constexpr (Masked) value[r] = v_keep(v_mask(kept), value[r]);
    }
    if (Masked && Power == 0 && any == 0) continue;
    for (int b = 0; b < Batch; ++b) {
      float *target = partial + b * ldp + j;
      vf sum = v_load(target);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) sum = v_fma(value[r], factor[b][r], sum);
      v_store(target, sum);
    }
  }
}

// partial has room for whole vectors beyond j1; the extra lanes only ever receive zeros.
void matvec_columns(const WeightView &view, int64_t columns, int64_t first, int64_t last, int64_t j0, int64_t j1,
                    const float *g, int64_t batch, int64_t ldg, float *partial, int64_t ldp) {
  with_weights(view, [&](auto power, const auto *data) {
    constexpr int kPower = decltype(power)::value;
    with_batch(batch, [&](auto size) {
      constexpr int kBatch = decltype(size)::value;
      int64_t r = first;
      if (view.mask) {
        for (; r + 4 <= last; r += 4) {
          matvec_column_rows<kPower, true, kBatch, 4>(data, view, columns, r, j0, j1, g, ldg, partial, ldp);
        }
        for (; r < last; ++r) {
          matvec_column_rows<kPower, true, kBatch, 1>(data, view, columns, r, j0, j1, g, ldg, partial, ldp);
        }
      } else {
        for (; r + 4 <= last; r += 4) {
          matvec_column_rows<kPower, false, kBatch, 4>(data, view, columns, r, j0, j1, g, ldg, partial, ldp);
        }
        for (; r < last; ++r) {
          matvec_column_rows<kPower, false, kBatch, 1>(data, view, columns, r, j0, j1, g, ldg, partial, ldp);
        }
      }
    });
  });
}

}  // namespace

// The inner kernels of the path operations, one table for each instruction set. The planning (layouts, tiles, threads)
// lives in ordinary files; only what runs per weight is compiled three times.
#pragma once

#include <cstdint>

namespace paikern {

enum class WeightType : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// V[i] = |W[i]|**power where bit i of the packed mask is set, else 0; power 0 reads no weight.
struct WeightView {
  const void *data;     // numel values, not read (may be null) when power is 0
  const uint8_t *mask;  // packed bits, little-endian, or null: everything kept
  int64_t numel;
  WeightType type;
  int power;
  double density = -1.0;  // of the mask, where it is known
};

// What the fused DPaI pass needs for one run of weights in one row (a whole number of kernels).
struct DpaiRow {
  float *s;              // [count] scores, updated
  float *m;              // [count] Adam's moments, null for plain ascent
  float *v;              // [count]
  const float *q;        // [count] dlogR/dM before scaling by q_scale
  const uint8_t *mask;   // packed bits of the whole weight
  const uint64_t *live;  // [ceil(count / 64)] node liveness per weight, or null: live_row holds for all
  uint64_t *words;       // [2 * ceil(count / 64)] scratch
  int64_t start;         // index of the first weight in the tensor
  int64_t numel;         // weights in the tensor
  int64_t count;
  int64_t kernel;  // weights a kernel
  bool live_row;
};

// Constants of one update: u for dead nodes is 1, for live nodes with a dead kernel `kernel_dead`, else `effective`.
struct DpaiRule {
  float q_scale, kernel_dead, effective;
  float step;                           // ascent: eta; Adam: lr / (1 - beta1**t)
  float beta1, beta2, inverse_root_c2;  // inverse_root_c2 = 1 / sqrt(1 - beta2**t)
  float epsilon;
};

// Effective weights and kernels of the mask before the update; whether every score after it is finite.
struct DpaiCounts {
  int64_t weights = 0, kernels = 0;
  bool finite = true;
};

// Positions side by side: where they start in a row of G and in a block of X.
struct OuterRun {
  int64_t g, x, length;
};

struct SweepRows;  // path_sweep.h
struct SweepFound;

constexpr int64_t kDepth = 192;  // reduction indices a panel: 8 rows of A and 48 columns of B stay in L1

struct PathKernels {
  const char *name;
  int lanes, tile_rows, tile_columns;

  // dst[i] = V[start + i] for i < count; the rest up to a multiple of `lanes` becomes 0.
  void (*decode)(const WeightView &w, int64_t start, int64_t count, float *dst);

  // Bits set in `bytes` bytes.
  int64_t (*count_bits)(const uint8_t *mask, int64_t bytes);

  // Rows of a map, every `step`-th float, to rows of a plane in ascending order: whole vectors are written, zeros
  // behind.
  void (*fill_rows)(const float *src, int64_t src_pitch, int64_t step, int64_t rows, int64_t width, float *dst,
                    int64_t dst_pitch);

  // Rows of a plane, read in whole vectors, to every `step`-th float of the rows of a map; nothing else is written.
  void (*write_rows)(const float *src, int64_t src_pitch, int64_t step, int64_t rows, int64_t width, float *dst,
                     int64_t dst_pitch);

  // Columns q .. q + width (a multiple of lanes) of the rows base + offset[k] as tiles [tile][depth][tile_columns].
  void (*pack_columns)(const float *base, const int64_t *offset, int64_t depth, int64_t width, float *dst);

  // C[r, n] (+)= sum_k A[r, k] B[k, n], k ascending, one fused multiply-add each. A: panels of tile_rows rows,
  // [panel][tile_rows][kDepth], or [panel][kDepth][tile_rows] when depth_major. C: rows padded to whole panels.
  void (*multiply)(const float *a, bool depth_major, int64_t panels, const float *b, int64_t width, int64_t depth,
                   float *c, int64_t ldc, bool accumulate);

  // The same with B where the planes lie: B[k, n] = base[offset[k] + n].
  void (*multiply_planes)(const float *a, bool depth_major, int64_t panels, const float *base, const int64_t *offset,
                          int64_t width, int64_t depth, float *c, int64_t ldc, bool accumulate);

  // The kept weights of start .. start + count in order: keys[n] = key[i], values[n] = V[start + i]; returns how many.
  // keys and values have room for count + lanes, key for count + lanes reads.
  int64_t (*list_kept)(const WeightView &w, int64_t start, int64_t count, const int32_t *key, int32_t *keys,
                       float *values);

  // c[n] = sum over i of values[i] * base[offsets[i] + n], i ascending: rounds exactly as `multiply` does.
  void (*gather)(const int32_t *offsets, const float *values, int64_t count, const float *base, int64_t width,
                 float *c);

  // base[offsets[i] + n] += values[i] * g[n] for n < width, a whole number of vectors, i ascending.
  void (*scatter)(const int32_t *offsets, const float *values, int64_t count, const float *g, int64_t width,
                  float *base);

  // out[n] = sum over i of values[i] * map[columns[i]][n] for n < width, 4, 8, 12 or 16: rounds as few_dots and
  // few_fold.
  void (*gather_columns)(const uint16_t *columns, const float *values, int64_t count, const float *map, int64_t width,
                         float *out);

  // out[i] = values[i] * sum over p < width of g[p] * map[columns[i]][p]: rounds as few_sweep.
  void (*score_columns)(const uint16_t *columns, const float *values, int64_t count, const float *map, int64_t width,
                        const float *g, float *out);

  // sums[columns[i]][n] += values[i] * g[n] for n < width, 4, 8, 12 or 16, i ascending.
  void (*scatter_columns)(const uint16_t *columns, const float *values, int64_t count, const float *g, int64_t width,
                          float *sums);

  // Keeps the entries whose bit first + columns[i] is 1, in order; returns how many.
  int64_t (*filter_kept)(uint16_t *columns, float *values, int64_t count, const uint8_t *mask, int64_t bytes,
                         int64_t first);

  // out[b, row] = sum_j V[row, j] x[b, j] for rows first .. last, 1 <= batch <= 4, x [batch, columns].
  void (*matvec_rows)(const WeightView &w, int64_t columns, int64_t first, int64_t last, const float *x, int64_t batch,
                      float *out, int64_t ldo);

  // partial[b, j] = sum over rows first .. last of V[row, j] g[b, row], columns j0 .. j1 only, partial [batch,
  // columns].
  void (*matvec_columns)(const WeightView &w, int64_t columns, int64_t first, int64_t last, int64_t j0, int64_t j1,
                         const float *g, int64_t batch, int64_t ldg, float *partial, int64_t ldp);

  // x' and the selection of a few rows in one read.
  void (*sweep_rows)(const SweepRows &rows, SweepFound &found);

  // out[i] = V[start + i] * q[i], `pruned` where the mask bit is 0.
  void (*score)(const WeightView &w, int64_t start, int64_t count, const float *q, float pruned, float *out);

  // dst[k * lanes + i] = planes[offsets[i] + k * step] for k < length and i < count <= lanes.
  void (*pack_lanes)(const float *planes, const int64_t *offsets, int64_t count, int64_t length, int64_t step,
                     float *dst);

  // c[r * ldc + v * lanes + i] (+)= sum over the positions k of `runs`, in their order, of
  // a[r * row_step + k.g * step] * b[v][k.x * lanes + i], for tile_rows rows and 1 to 3 vectors.
  void (*outer)(const float *a, int64_t row_step, int64_t step, const float *const *b, int64_t vectors,
                const OuterRun *runs, int64_t count, float *c, int64_t ldc, bool accumulate);

  // dst[i * taps + t] = src[t * lanes + i] for i < channels <= lanes; up to lanes - 1 floats behind are overwritten.
  void (*interleave)(const float *src, int64_t taps, int64_t channels, float *dst);

  // c[r * ldc + j] = sum over k < length, a whole number of vectors, of g[r * row_step + k] * x[offsets[j] + k]: one
  // partial sum a lane, k ascending, then a fold.
  void (*dots)(const float *g, int64_t row_step, int64_t rows, const float *x, const int32_t *offsets, int64_t count,
               int64_t length, float *c, int64_t ldc);

  // out[i] = the next of `kept` where mask bit start + i is 1, else `pruned`; `kept` is read up to lanes behind.
  void (*expand)(const WeightView &w, int64_t start, int64_t count, const float *kept, float pruned, float *out);

  // Dot products and the adjoint sweep of a few rows over a few positions, see path_few.inc.h.
  void (*few_dots)(const float *v, int64_t ldv, const float *x, int64_t positions, int64_t vectors, float *sums);
  void (*few_fold)(const float *sums, int64_t count, float *out);
  void (*few_sweep)(const float *v, int64_t ldv, const float *g, const float *x, int64_t positions, int64_t vectors,
                    float *sums, float *q, int64_t ldq);

  // The largest of `count` values, NaN where one is NaN, 0 of none.
  float (*maximum)(const float *values, int64_t count);

  void (*dpai_row)(const DpaiRow &row, const DpaiRule &rule, DpaiCounts &counts);
};

const PathKernels &path_kernels_portable();
const PathKernels &path_kernels_avx2();
const PathKernels &path_kernels_avx512();

// The table that fits this CPU and PAIKERN_CPU_ISA.
const PathKernels &path_kernels();

// `count` <= 57 bits of a packed mask of `bytes` bytes, starting at bit `start`; bits past the end read as 0.
inline uint64_t mask_bits(const uint8_t *mask, int64_t bytes, int64_t start, int count) {
  const int64_t byte = start >> 3;
  uint64_t word = 0;
  if (byte + 8 <= bytes) {
    __builtin_memcpy(&word, mask + byte, 8);
  } else {
    for (int64_t i = byte; i < bytes; ++i) word |= static_cast<uint64_t>(mask[i]) << (8 * (i - byte));
  }
  word >>= start & 7;
  return word & ((uint64_t{1} << count) - 1);
}

}  // namespace paikern

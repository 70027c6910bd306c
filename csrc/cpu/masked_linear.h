// Products with a packed weight V = W * M on the CPU: Y = X V^T + b, dX = dY V and dV = M * (dY^T X).
#pragma once

#include <cstdint>

#include "masked_linear_kernels.h"

namespace paikern {

constexpr int64_t kMaskedColumns = int64_t{1} << 16;  // that 16 bits can tell apart

// The kept weights in row-major order. Columns are cut into panels: row r has the entries starts[r * panels] up to
// starts[(r + 1) * panels], those of panel p from starts[r * panels + p] on. An entry's column is stored modulo 65,536;
// a panel, a power of two, does not cross a multiple of that.
struct PackedView {
  const void *values;
  WeightType type;
  const int32_t *source;  // entry i has the value values[source[i]], or values[i] where null
  const uint16_t *positions;
  const int32_t *starts;
  int64_t rows, columns, panel;

  int64_t panels() const { return (columns + panel - 1) / panel; }
  int64_t kept() const { return starts[rows * panels()]; }
};

// y [batch, rows] = x [batch, columns] V^T + bias. The order of every sum is that of the entries: the same for any
// number of threads and any place in the batch from three rows on.
void masked_linear(const PackedView &v, const float *x, int64_t batch, const float *bias, float *y);

// out[i] = sum over the batch of g [batch, rows] at the row times x [batch, columns] at the column of entry i.
void masked_linear_kept(const PackedView &v, const float *g, const float *x, int64_t batch, float *out);

// The kept weights of a tensor [rows, columns] whose elements have `size` bytes, 1, 2, 4, 8 or 16, and where they are:
// columns, or the packed bits of the mask.
struct KeptView {
  void *values;
  const uint16_t *positions;
  const uint8_t *bits;  // null where there are positions
  const int32_t *starts;
  int64_t rows, columns, panel;

  int64_t panels() const { return (columns + panel - 1) / panel; }
};

// dense [count, columns] = rows first .. first + count, zeros where nothing is kept.
void scatter_kept(const KeptView &v, int64_t size, int64_t first, int64_t count, void *dense);

// The values of rows first .. first + count out of dense [count, columns].
void gather_kept(const KeptView &v, int64_t size, int64_t first, int64_t count, const void *dense);

// The entries of a packed mask [rows, columns]: positions and starts of V; starts alone where positions is null.
void list_positions(const uint8_t *bits, int64_t rows, int64_t columns, int64_t panel, uint16_t *positions,
                    int32_t *starts);

// The entries of V^T, with rows cut into panels of `panel`; source[i] is the entry of V that entry i was.
void transpose_positions(const PackedView &v, int64_t panel, uint16_t *positions, int32_t *starts, int32_t *source);

}  // namespace paikern

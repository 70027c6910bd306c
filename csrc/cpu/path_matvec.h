// V x and V^T g of a linear weight for 1 to 4 vectors, one read of W each.
#pragma once

#include "path_kernels.h"

namespace paikern {

// z [batch, rows], x [batch, columns]
void matvec_rows(int64_t rows, int64_t columns, const WeightView &w, const float *x, int64_t batch, float *z);

// x [batch, columns], g [batch, rows]. Rows are summed in ranges of kSumRows, one table of partial sums each, and the
// tables added in order: ranges depend on the shape alone, so the order of the sums does too.
constexpr int64_t kSumRows = 256;
void matvec_columns(int64_t rows, int64_t columns, const WeightView &w, const float *g, int64_t batch, float *x);

// x[j] = sum over tables of tables[t * stride + j], t ascending.
void add_tables(const float *tables, int64_t count, int64_t stride, int64_t columns, float *x);

}  // namespace paikern

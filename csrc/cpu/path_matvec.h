// V x and V^T g of a linear weight for 1 to 4 vectors, one read of W each.
#pragma once

#include "path_kernels.h"

namespace paikern {

// z [batch, rows], x [batch, columns]
void matvec_rows(int64_t rows, int64_t columns, const WeightView &w, const float *x, int64_t batch, float *z);

// x [batch, columns], g [batch, rows]
void matvec_columns(int64_t rows, int64_t columns, const WeightView &w, const float *g, int64_t batch, float *x);

}  // namespace paikern

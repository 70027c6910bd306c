#include "path_matvec.h"

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "path_plan.h"

namespace paikern {

const PathKernels &path_kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return path_kernels_avx512();
  if (isa() == Isa::kAvx2) return path_kernels_avx2();
#endif
  return path_kernels_portable();
}

void matvec_rows(int64_t rows, int64_t columns, const WeightView &w, const float *x, int64_t batch, float *z) {
  constexpr int64_t kRows = 32;
  const PathKernels &kernels = path_kernels();
  const int64_t blocks = divide_up(rows, kRows);
#pragma omp parallel for schedule(static) if (rows * columns > parallel_work())
  for (int64_t b = 0; b < blocks; ++b) {
    kernels.matvec_rows(w, columns, b * kRows, std::min(rows, (b + 1) * kRows), x, batch, z, rows);
  }
}

void matvec_columns(int64_t rows, int64_t columns, const WeightView &w, const float *g, int64_t batch, float *x) {
  constexpr int64_t kRows = kSumRows, kColumns = 2048;  // columns of partial sums: 8 KB
  const PathKernels &kernels = path_kernels();
  const int64_t chunks = divide_up(rows, kRows), blocks = divide_up(columns, kColumns);
  const int64_t ld = round_up(columns, 16) + 16;
  const bool parallel = rows * columns > parallel_work();
  const FloatBuffer partial(chunks * batch * ld);
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t task = 0; task < chunks * blocks; ++task) {
    const int64_t chunk = task / blocks, j0 = task % blocks * kColumns, j1 = std::min(columns, j0 + kColumns);
    float *table = partial.get() + chunk * batch * ld;
    for (int64_t b = 0; b < batch; ++b) {
      std::memset(table + b * ld + j0, 0, sizeof(float) * static_cast<size_t>(round_up(j1 - j0, 16)));
    }
    kernels.matvec_columns(w, columns, chunk * kRows, std::min(rows, (chunk + 1) * kRows), j0, j1, g, batch, rows,
                           table, ld);
  }
  for (int64_t b = 0; b < batch; ++b) add_tables(partial.get() + b * ld, chunks, batch * ld, columns, x + b * columns);
}

void add_tables(const float *tables, int64_t count, int64_t stride, int64_t columns, float *x) {
  std::fill(x, x + columns, 0.0f);
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t j = 0; j < columns; ++j) x[j] += tables[t * stride + j];
  }
}

}  // namespace paikern

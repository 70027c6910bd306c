// The path kernels for AVX2, FMA and F16C. The code is path_kernels.inc.h.
#include "path_kernels.inc.h"

namespace paikern {

const PathKernels &path_kernels_avx2() {
  static constexpr PathKernels kTable = make_path_kernels("avx2");
  return kTable;
}

}  // namespace paikern

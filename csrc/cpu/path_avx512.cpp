// The path kernels for AVX-512 F, BW, DQ and VL. The code is path_kernels.inc.h.
#include "path_kernels.inc.h"

namespace paikern {

const PathKernels &path_kernels_avx512() {
  static constexpr PathKernels kTable = make_path_kernels("avx512");
  return kTable;
}

}  // namespace paikern

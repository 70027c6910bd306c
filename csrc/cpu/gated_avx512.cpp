// The kernels of gated.cpp for AVX-512. The code is gated_kernels.inc.h.
#include "gated_kernels.inc.h"

namespace paikern {

const GatedKernels &gated_kernels_avx512() {
  static constexpr GatedKernels kTable = make_gated_kernels();
  return kTable;
}

}  // namespace paikern

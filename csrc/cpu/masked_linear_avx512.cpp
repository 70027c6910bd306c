// The kernels of masked_linear for AVX-512 F, BW, DQ and VL. The code is masked_linear.inc.h.
#include "masked_linear.inc.h"

namespace paikern {

const MaskedKernels &masked_kernels_avx512() {
  static constexpr MaskedKernels kTable = make_masked_kernels("avx512");
  return kTable;
}

}  // namespace paikern

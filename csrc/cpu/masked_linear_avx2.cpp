// The kernels of masked_linear for AVX2, FMA and F16C. The code is masked_linear.inc.h.
#include "masked_linear.inc.h"

namespace paikern {

const MaskedKernels &masked_kernels_avx2() {
  static constexpr MaskedKernels kTable = make_masked_kernels("avx2");
  return kTable;
}

}  // namespace paikern

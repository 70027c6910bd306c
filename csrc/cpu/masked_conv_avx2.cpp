// The kernels of masked_conv2d for AVX2, FMA and F16C. The code is masked_conv.inc.h.
#include "masked_conv.inc.h"

namespace paikern {

const ConvKernels &conv_kernels_avx2() {
  static constexpr ConvKernels kTable = make_conv_kernels("avx2");
  return kTable;
}

}  // namespace paikern

// The kernels of masked_conv2d for AVX-512 F, BW, DQ and VL. The code is masked_conv.inc.h.
#include "masked_conv.inc.h"

namespace paikern {

const ConvKernels &conv_kernels_avx512() {
  static constexpr ConvKernels kTable = make_conv_kernels("avx512");
  return kTable;
}

}  // namespace paikern

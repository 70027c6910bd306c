// The kernels of masked_conv2d for the baseline of the target. The code is masked_conv.inc.h.
#include "masked_conv.inc.h"

namespace paikern {

const ConvKernels &conv_kernels_portable() {
  static constexpr ConvKernels kTable = make_conv_kernels("portable");
  return kTable;
}

}  // namespace paikern

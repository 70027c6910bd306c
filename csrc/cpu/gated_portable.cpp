// The kernels of gated.cpp for the baseline of the target. The code is gated_kernels.inc.h.
#include "gated_kernels.inc.h"

namespace paikern {

const GatedKernels &gated_kernels_portable() {
  static constexpr GatedKernels kTable = make_gated_kernels();
  return kTable;
}

}  // namespace paikern

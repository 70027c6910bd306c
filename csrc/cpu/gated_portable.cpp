// The kernels of gated.cpp for the baseline of the target. The code is gated_kernels.inc.h.
#include "gated_kernels.inc.h"

namespace paikern {

const GatedKernels &gated_kernels_portable(int step) {
  static constexpr GatedKernels kTables[] = {make_gated_kernels<1>(), make_gated_kernels<2>()};
  return kTables[step - 1];
}

}  // namespace paikern

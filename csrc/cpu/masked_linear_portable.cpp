// The kernels of masked_linear for the baseline of the target. The code is masked_linear.inc.h.
#include "masked_linear.inc.h"

namespace paikern {

const MaskedKernels &masked_kernels_portable() {
  static constexpr MaskedKernels kTable = make_masked_kernels("portable");
  return kTable;
}

}  // namespace paikern

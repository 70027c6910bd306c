// The path kernels for the baseline of the target. The code is path_kernels.inc.h.
#include "path_kernels.inc.h"

namespace paikern {

const PathKernels &path_kernels_portable() {
  static constexpr PathKernels kTable = make_path_kernels("portable");
  return kTable;
}

}  // namespace paikern

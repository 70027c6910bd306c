// Bindings of csrc/cpu/balanced_mask.h.
#include <pybind11/pybind11.h>

#include "balanced_mask.h"

namespace py = pybind11;

void bind_balanced_mask(py::module_ &m) {
  m.def("balanced_mask", [](uintptr_t rows, int64_t groups, int64_t inputs, int64_t outputs, int64_t positions,
                            bool transposed, int64_t cover, uint64_t seed, uint32_t stream, uintptr_t scores, bool wide,
                            uintptr_t bits) {
    const py::gil_scoped_release release;
    return paikern::balanced_mask(reinterpret_cast<const int64_t *>(rows),
                                  {groups, inputs, outputs, positions, transposed}, cover, seed, stream,
                                  reinterpret_cast<const void *>(scores), wide, reinterpret_cast<uint8_t *>(bits));
  });
}

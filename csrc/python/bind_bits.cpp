// Bindings of csrc/cpu/bits.h.
#include <pybind11/pybind11.h>

#include "bits.h"

namespace py = pybind11;

void bind_bits(py::module_ &m) {
  m.def("pack_mask", [](uintptr_t mask, int64_t numel, uintptr_t packed) {
    py::gil_scoped_release release;
    paikern::pack_mask(reinterpret_cast<const uint8_t *>(mask), numel, reinterpret_cast<uint8_t *>(packed));
  });
  m.def("unpack_mask", [](uintptr_t packed, int64_t numel, uintptr_t mask) {
    py::gil_scoped_release release;
    paikern::unpack_mask(reinterpret_cast<const uint8_t *>(packed), numel, reinterpret_cast<uint8_t *>(mask));
  });
  m.def("apply_mask", [](uintptr_t values, int itemsize, int64_t numel, uintptr_t packed) {
    py::gil_scoped_release release;
    paikern::apply_mask(reinterpret_cast<void *>(values), itemsize, numel, reinterpret_cast<const uint8_t *>(packed));
  });
}

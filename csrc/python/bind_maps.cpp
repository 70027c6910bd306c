// Bindings of csrc/cpu/maps.h.
#include <pybind11/pybind11.h>

#include "maps.h"

namespace py = pybind11;

namespace {

float *floats(uintptr_t address) { return reinterpret_cast<float *>(address); }

}  // namespace

void bind_maps(py::module_ &m) {
  m.def("map_maximum", [](uintptr_t values, int64_t numel) { return paikern::map_maximum(floats(values), numel); });
  m.def("map_scale", [](uintptr_t values, int64_t numel, int by, float floor) {
    paikern::map_scale(floats(values), numel, by, floor);
  });
  m.def("live_nodes", [](uintptr_t y, uintptr_t g, int64_t outer, int64_t channels, int64_t inner, uintptr_t live) {
    paikern::live_nodes(floats(y), floats(g), outer, channels, inner, reinterpret_cast<uint8_t *>(live));
  });
  m.def("through_maximum", [](uintptr_t g, uintptr_t x, int64_t numel, double maximum) {
    paikern::through_maximum(floats(g), floats(x), numel, maximum);
  });
}

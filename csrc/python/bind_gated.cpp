// Bindings of csrc/cpu/gated.h. Maps are (channels, h, w); steps are tuples of 15 integers, see cpu_gated.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <tuple>

#include "gated.h"

namespace py = pybind11;

namespace {

using paikern::GatedKind;
using paikern::GatedMap;
using paikern::GatedProgram;
using paikern::GatedStep;
using paikern::GatedWeight;

std::unique_ptr<GatedProgram> make_program(const std::vector<std::array<int64_t, 3>> &maps,
                                           const std::vector<std::array<int64_t, 15>> &steps, int64_t output) {
  std::vector<GatedMap> shapes;
  for (const auto &m : maps) shapes.push_back({m[0], m[1], m[2]});
  std::vector<GatedStep> made;
  for (const auto &s : steps) {
    made.push_back({static_cast<GatedKind>(s[0]),
                    s[1],
                    s[2],
                    s[3],
                    s[4] != 0,
                    s[5] != 0,
                    s[6],
                    {s[7], s[8]},
                    {s[9], s[10]},
                    {s[11], s[12]},
                    {s[13], s[14]}});
  }
  return std::make_unique<GatedProgram>(std::move(shapes), std::move(made), output);
}

}  // namespace

void bind_gated(py::module_ &m) {
  py::class_<GatedProgram>(m, "GatedProgram")
      .def(py::init(&make_program))
      .def("load",
           [](GatedProgram &p,
              const std::vector<std::tuple<int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>> &rows) {
             std::vector<GatedWeight> weights;
             for (const auto &[step, theta, mask, scale, shift] : rows) {
               weights.push_back({step, reinterpret_cast<const float *>(theta), reinterpret_cast<const uint8_t *>(mask),
                                  reinterpret_cast<const float *>(scale), reinterpret_cast<const float *>(shift)});
             }
             const py::gil_scoped_release release;
             p.load(weights);
           })
      .def("run", [](GatedProgram &p, uintptr_t x, int64_t samples, uintptr_t total, uintptr_t f) {
        const py::gil_scoped_release release;
        return p.run(reinterpret_cast<const float *>(x), samples, reinterpret_cast<double *>(total),
                     reinterpret_cast<float *>(f));
      });
}

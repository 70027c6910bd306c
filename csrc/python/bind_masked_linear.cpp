// Bindings of csrc/cpu/masked_linear.h. A packed weight comes as one tuple: values, type, source, positions, starts,
// rows, columns, panel.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "masked_linear.h"

namespace py = pybind11;

namespace {

using paikern::PackedView;

template <class T>
T *pointer(uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

PackedView read_view(const py::tuple &v) {
  const auto address = [&](size_t i) { return v[i].cast<uintptr_t>(); };
  const auto size = [&](size_t i) { return v[i].cast<int64_t>(); };
  return {pointer<const void>(address(0)),
          static_cast<paikern::WeightType>(v[1].cast<int>()),
          pointer<const int32_t>(address(2)),
          pointer<const uint16_t>(address(3)),
          pointer<const int32_t>(address(4)),
          size(5),
          size(6),
          size(7)};
}

paikern::KeptView read_where(const py::tuple &v) {
  const auto address = [&](size_t i) { return v[i].cast<uintptr_t>(); };
  const auto size = [&](size_t i) { return v[i].cast<int64_t>(); };
  const bool bits = v[2].cast<bool>();
  return {pointer<void>(address(0)),
          bits ? nullptr : pointer<const uint16_t>(address(1)),
          bits ? pointer<const uint8_t>(address(1)) : nullptr,
          pointer<const int32_t>(address(3)),
          size(4),
          size(5),
          size(6)};
}

}  // namespace

void bind_masked_linear(py::module_ &m) {
  m.def("masked_linear", [](const py::tuple &view, uintptr_t x, int64_t batch, uintptr_t bias, uintptr_t y) {
    const PackedView v = read_view(view);
    const py::gil_scoped_release release;
    paikern::masked_linear(v, pointer<const float>(x), batch, pointer<const float>(bias), pointer<float>(y));
  });
  m.def("masked_linear_kept", [](const py::tuple &view, uintptr_t g, uintptr_t x, int64_t batch, uintptr_t out) {
    const PackedView v = read_view(view);
    const py::gil_scoped_release release;
    paikern::masked_linear_kept(v, pointer<const float>(g), pointer<const float>(x), batch, pointer<float>(out));
  });
  m.def("scatter_kept", [](const py::tuple &where, int64_t size, int64_t first, int64_t count, uintptr_t dense) {
    const paikern::KeptView v = read_where(where);
    const py::gil_scoped_release release;
    paikern::scatter_kept(v, size, first, count, pointer<void>(dense));
  });
  m.def("gather_kept", [](const py::tuple &where, int64_t size, int64_t first, int64_t count, uintptr_t dense) {
    const paikern::KeptView v = read_where(where);
    const py::gil_scoped_release release;
    paikern::gather_kept(v, size, first, count, pointer<const void>(dense));
  });
  m.def("list_positions",
        [](uintptr_t bits, int64_t rows, int64_t columns, int64_t panel, uintptr_t positions, uintptr_t starts) {
          const py::gil_scoped_release release;
          paikern::list_positions(pointer<const uint8_t>(bits), rows, columns, panel, pointer<uint16_t>(positions),
                                  pointer<int32_t>(starts));
        });
  m.def("transpose_positions",
        [](const py::tuple &view, int64_t panel, uintptr_t positions, uintptr_t starts, uintptr_t source) {
          const PackedView v = read_view(view);
          const py::gil_scoped_release release;
          paikern::transpose_positions(v, panel, pointer<uint16_t>(positions), pointer<int32_t>(starts),
                                       pointer<int32_t>(source));
        });
}

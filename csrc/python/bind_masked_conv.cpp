// Bindings of csrc/cpu/masked_conv.h. A packed weight comes as one tuple: values, source, positions, starts, rows,
// columns, panel; a shape as batch, groups, rows, channels and then pairs: size, kernel, stride, padding, dilation,
// out; a map as its address and type.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "masked_conv.h"

namespace py = pybind11;

namespace {

template <class T>
T *pointer(uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

int64_t number(const py::tuple &v, size_t i) { return v[i].cast<int64_t>(); }

paikern::ConvEntries read_entries(const py::tuple &v) {
  const auto address = [&](size_t i) { return v[i].cast<uintptr_t>(); };
  return {pointer<const float>(address(0)),
          pointer<const int32_t>(address(1)),
          pointer<const uint16_t>(address(2)),
          pointer<const int32_t>(address(3)),
          number(v, 4),
          number(v, 5),
          number(v, 6)};
}

paikern::ConvShape read_shape(const py::tuple &v) {
  paikern::ConvShape s{number(v, 0), number(v, 1), number(v, 2), number(v, 3), {}, {}, {}, {}, {}, {}};
  for (size_t a = 0; a < 2; ++a) {
    s.size[a] = number(v, 4 + a);
    s.kernel[a] = number(v, 6 + a);
    s.stride[a] = number(v, 8 + a);
    s.padding[a] = number(v, 10 + a);
    s.dilation[a] = number(v, 12 + a);
    s.out[a] = number(v, 14 + a);
  }
  return s;
}

paikern::ConvMap read_map(const py::tuple &v) {
  return {pointer<const void>(v[0].cast<uintptr_t>()), static_cast<paikern::WeightType>(v[1].cast<int>())};
}

}  // namespace

void bind_masked_conv(py::module_ &m) {
  m.def("masked_conv2d",
        [](const py::tuple &shape, const py::tuple &weight, const py::tuple &x, uintptr_t bias, uintptr_t y) {
          const auto s = read_shape(shape);
          const auto v = read_entries(weight);
          const auto map = read_map(x);
          const py::gil_scoped_release release;
          paikern::masked_conv2d(s, v, map, pointer<const float>(bias), pointer<float>(y));
        });
  m.def("masked_conv2d_input", [](const py::tuple &shape, const py::tuple &weight, const py::tuple &g, uintptr_t x) {
    const auto s = read_shape(shape);
    const auto v = read_entries(weight);
    const auto map = read_map(g);
    const py::gil_scoped_release release;
    paikern::masked_conv2d_input(s, v, map, pointer<float>(x));
  });
  m.def("masked_conv2d_kept",
        [](const py::tuple &shape, const py::tuple &weight, const py::tuple &g, const py::tuple &x, uintptr_t out) {
          const auto s = read_shape(shape);
          const auto v = read_entries(weight);
          const auto left = read_map(g), right = read_map(x);
          const py::gil_scoped_release release;
          paikern::masked_conv2d_kept(s, v, left, right, pointer<float>(out));
        });
}

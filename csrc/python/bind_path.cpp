// Bindings of the path operations. A geometry comes as one tuple of 21 integers, see paikern/backends/cpu_path.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <tuple>

#include "geometry.h"
#include "path.h"
#include "path_sweep.h"
#include "subnormals.h"

namespace py = pybind11;

namespace {

using paikern::DpaiCounts;
using paikern::DpaiRule;
using paikern::DpaiState;
using paikern::PathGeometry;
using paikern::WeightType;
using paikern::WeightView;
using paikern::python::Geometry;

template <class T>
T *pointer(uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

PathGeometry read_geometry(const py::tuple &values) {
  PathGeometry g{};
  int64_t at = 0;
  const auto next = [&] { return values[static_cast<size_t>(at++)].cast<int64_t>(); };
  g.batch = next();
  g.groups = next();
  g.rows = next();
  g.channels = next();
  for (auto *axes : {&g.size, &g.kernel, &g.stride, &g.padding, &g.dilation, &g.out}) {
    for (int64_t &value : *axes) value = next();
  }
  return g;
}

WeightView weight_view(const PathGeometry &g, uintptr_t data, int type, int power, uintptr_t mask) {
  return {pointer<const void>(data), pointer<const uint8_t>(mask), g.rows * g.depth(), static_cast<WeightType>(type),
          power};
}

DpaiRule read_rule(const std::array<double, 8> &v) {
  return {static_cast<float>(v[0]), static_cast<float>(v[1]), static_cast<float>(v[2]), static_cast<float>(v[3]),
          static_cast<float>(v[4]), static_cast<float>(v[5]), static_cast<float>(v[6]), static_cast<float>(v[7])};
}

DpaiState read_state(uintptr_t s, uintptr_t m, uintptr_t v, uintptr_t mask, uintptr_t live, bool node_is_channel) {
  return {pointer<float>(s),
          pointer<float>(m),
          pointer<float>(v),
          pointer<const uint8_t>(mask),
          pointer<const uint8_t>(live),
          node_is_channel};
}

// Sees the scores that are NaN, where no band asks for others.
class NanSink final : public paikern::SweepSink {
 public:
  void take(const float *scores, const int64_t *, int64_t count) override {
    for (int64_t i = 0; i < count; ++i) {
      if (scores[i] != scores[i]) seen_ = true;
    }
  }
  bool seen() const { return seen_; }

 private:
  std::atomic<bool> seen_{false};
};

py::tuple counts_tuple(const DpaiCounts &counts) {
  return py::make_tuple(counts.weights, counts.kernels, static_cast<int64_t>(counts.finite));
}

}  // namespace

void bind_path(py::module_ &m) {
  py::class_<Geometry>(m, "PathGeometry").def(py::init([](const py::tuple &values) {
    return Geometry{read_geometry(values)};
  }));
  m.def("path_forward",
        [](const Geometry &g, uintptr_t w, int type, int power, uintptr_t mask, uintptr_t x, uintptr_t z) {
          const py::gil_scoped_release release;
          paikern::path_forward(g.value, weight_view(g.value, w, type, power, mask), pointer<const float>(x),
                                pointer<float>(z));
        });
  m.def("path_backward",
        [](const Geometry &g, uintptr_t w, int type, int power, uintptr_t mask, uintptr_t grad, uintptr_t x) {
          const py::gil_scoped_release release;
          paikern::path_backward(g.value, weight_view(g.value, w, type, power, mask), pointer<const float>(grad),
                                 pointer<float>(x));
        });
  m.def("path_score", [](const Geometry &g, uintptr_t w, int type, int power, uintptr_t mask, uintptr_t x,
                         uintptr_t grad, double pruned, uintptr_t score) {
    const py::gil_scoped_release release;
    paikern::path_score(g.value, weight_view(g.value, w, type, power, mask), pointer<const float>(x),
                        pointer<const float>(grad), static_cast<float>(pruned), pointer<float>(score));
  });
  // The bits set, or -1 where a score is NaN.
  m.def("path_sweep",
        [](int64_t rows, int64_t columns, uintptr_t w, int type, int power, uintptr_t mask, uintptr_t a, uintptr_t grad,
           double threshold, uintptr_t x, uintptr_t bits) -> int64_t {
          const py::gil_scoped_release release;
          const paikern::SubnormalsCount guard;
          const paikern::WeightView view{pointer<const void>(w), pointer<const uint8_t>(mask), rows * columns,
                                         static_cast<WeightType>(type), power};
          const float high = paikern::rounded_down(threshold), infinity = std::numeric_limits<float>::infinity();
          NanSink sink;
          const int64_t above =
              paikern::path_sweep({view, rows, columns, pointer<const float>(a), pointer<const float>(grad)},
                                  {infinity, high}, pointer<uint8_t>(bits), pointer<float>(x), sink);
          return sink.seen() ? -1 : above;
        });
  m.def("dpai_step",
        [](const Geometry &g, uintptr_t s, uintptr_t moment1, uintptr_t moment2, uintptr_t mask, uintptr_t live,
           bool node_is_channel, uintptr_t x, uintptr_t grad, const std::array<double, 8> &rule) {
          DpaiCounts counts;
          {
            const py::gil_scoped_release release;
            counts = paikern::dpai_step(g.value, read_state(s, moment1, moment2, mask, live, node_is_channel),
                                        read_rule(rule), pointer<const float>(x), pointer<const float>(grad));
          }
          return counts_tuple(counts);
        });
  m.def("dpai_update", [](const Geometry &g, uintptr_t s, uintptr_t moment1, uintptr_t moment2, uintptr_t mask,
                          uintptr_t live, bool node_is_channel, uintptr_t q, const std::array<double, 8> &rule) {
    DpaiCounts counts;
    {
      const py::gil_scoped_release release;
      counts = paikern::dpai_update(g.value, read_state(s, moment1, moment2, mask, live, node_is_channel),
                                    read_rule(rule), pointer<const float>(q));
    }
    return counts_tuple(counts);
  });
}

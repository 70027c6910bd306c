// Bindings of the native sweeps and of the loops on them. Programs arrive as lists of dictionaries, once for a run; see
// paikern/pathgraph/program.py for their making.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <tuple>

#include "dpai_loop.h"
#include "geometry.h"
#include "path_rounds.h"

namespace py = pybind11;

namespace {

using paikern::DpaiLayer;
using paikern::DpaiLoop;
using paikern::FlowKind;
using paikern::FlowStep;
using paikern::FlowValue;
using paikern::PathFlow;
using paikern::PathRounds;
using paikern::python::Geometry;

template <class T>
T *pointer(uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

template <class T>
T *address(const py::dict &d, const char *key) {
  return d.contains(key) ? pointer<T>(d[key].cast<uintptr_t>()) : nullptr;
}

template <class T>
T given(const py::dict &d, const char *key, T otherwise) {
  return d.contains(key) ? d[key].cast<T>() : otherwise;
}

FlowValue read_value(const py::dict &d) {
  FlowValue value;
  value.a = address<float>(d, "a");
  value.g = address<float>(d, "g");
  value.numel = d["numel"].cast<int64_t>();
  value.start = given(d, "start", false);
  return value;
}

FlowStep read_step(const py::dict &d) {
  FlowStep step;
  step.kind = static_cast<FlowKind>(d["kind"].cast<int>());
  step.inputs = d["inputs"].cast<std::vector<int64_t>>();
  step.output = d["output"].cast<int64_t>();
  if (d.contains("geometry")) {
    step.geometry = d["geometry"].cast<const Geometry &>().value;
    step.weight = {address<const void>(d, "weight"), nullptr, step.geometry.rows * step.geometry.depth(),
                   static_cast<paikern::WeightType>(given(d, "type", 0)), given(d, "power", 0)};
  }
  step.transposed = given(d, "transposed", false);
  step.parameter = given<int64_t>(d, "parameter", -1);
  step.by_rows = d.contains("first_bit");
  step.first_bit = given<int64_t>(d, "first_bit", 0);
  step.divided = address<float>(d, "divided");
  step.outer = given<int64_t>(d, "outer", 1);
  step.channels = given<int64_t>(d, "channels", 1);
  step.inner = given<int64_t>(d, "inner", 1);
  step.factor = address<const float>(d, "factor");
  step.offset = address<const float>(d, "offset");
  step.average = given(d, "average", false);
  step.argmax = address<int32_t>(d, "argmax");
  if (d.contains("pool")) {
    const auto p = d["pool"].cast<std::vector<int64_t>>();
    step.pool = {p[0], {p[1], p[2]}, {p[3], p[4]}, {p[5], p[6]}, {p[7], p[8]}, {p[9], p[10]}, {p[11], p[12]}};
  }
  return step;
}

// The callbacks take the lock: the sweeps run without it.
paikern::FlowCalls calls(const py::object &replay) {
  paikern::FlowCalls made;
  made.forward = [replay](int64_t step, const std::vector<int64_t> &exponents) {
    const py::gil_scoped_acquire acquire;
    replay.attr("forward")(step, exponents);
  };
  made.adjoint = [replay](int64_t step) {
    const py::gil_scoped_acquire acquire;
    std::vector<const float *> parts;
    for (const auto part : replay.attr("adjoint")(step)) parts.push_back(pointer<const float>(part.cast<uintptr_t>()));
    return parts;
  };
  return made;
}

std::unique_ptr<PathFlow> make_flow(const std::vector<py::dict> &values, const std::vector<py::dict> &steps,
                                    std::vector<int64_t> outputs, int64_t parameters, bool by_input_max, bool counts,
                                    const py::object &replay) {
  std::vector<FlowValue> made_values;
  std::vector<FlowStep> made_steps;
  for (const py::dict &d : values) made_values.push_back(read_value(d));
  for (const py::dict &d : steps) made_steps.push_back(read_step(d));
  return std::make_unique<PathFlow>(std::move(made_values), std::move(made_steps), std::move(outputs), parameters,
                                    paikern::FlowRules{by_input_max, counts}, calls(replay));
}

DpaiLayer read_layer(const py::dict &d) {
  DpaiLayer layer{};
  layer.s = address<float>(d, "s");
  layer.m = address<float>(d, "m");
  layer.v = address<float>(d, "v");
  layer.mask = address<uint8_t>(d, "mask");
  layer.memory = address<double>(d, "memory");
  layer.numel = d["numel"].cast<int64_t>();
  layer.k = d["k"].cast<int64_t>();
  layer.lr = d["lr"].cast<double>();
  if (d.contains("gathered")) {
    layer.gathered = address<float>(d, "gathered");
    layer.update = d["update"].cast<const Geometry &>().value;
    layer.nodes = d["nodes"].cast<int64_t>();
    layer.node_is_channel = d["node_is_channel"].cast<bool>();
  }
  return layer;
}

std::unique_ptr<DpaiLoop> make_loop(PathFlow &flow, const std::vector<py::dict> &layers, double alpha, double beta,
                                    bool adam) {
  std::vector<DpaiLayer> made;
  for (const py::dict &d : layers) made.push_back(read_layer(d));
  return std::make_unique<DpaiLoop>(flow, std::move(made), paikern::DpaiSettings{alpha, beta, adam});
}

}  // namespace

void bind_flow(py::module_ &m) {
  py::class_<PathFlow>(m, "PathFlow")
      .def(py::init(&make_flow))
      .def("forward", &PathFlow::forward, py::call_guard<py::gil_scoped_release>())
      .def("set_mask", [](PathFlow &flow, int64_t parameter,
                          uintptr_t mask) { flow.set_mask(parameter, pointer<const uint8_t>(mask)); })
      .def("set_cotangent", [](PathFlow &flow, int64_t output,
                               uintptr_t values) { flow.set_cotangent(output, pointer<const float>(values)); })
      .def("exponent", &PathFlow::exponent)
      .def_property_readonly("dead", &PathFlow::dead)
      .def_property_readonly("broken", &PathFlow::broken)
      .def_property_readonly("total", [](const PathFlow &flow) { return std::make_pair(flow.mantissa(), flow.top()); });

  py::class_<DpaiLoop>(m, "DpaiLoop")
      .def(py::init(&make_loop), py::keep_alive<1, 2>())
      .def("select", &DpaiLoop::select, py::call_guard<py::gil_scoped_release>())
      .def("run",
           [](DpaiLoop &loop, int64_t done, int64_t steps, double seconds, int64_t patience) {
             std::vector<paikern::DpaiRecord> records;
             paikern::DpaiStatus status;
             {
               const py::gil_scoped_release release;
               status = loop.run(done, steps, seconds, patience, &records);
             }
             py::list rows;
             for (const auto &r : records) rows.append(py::make_tuple(r.objective, r.nodes, r.kernels, r.weights));
             return py::make_tuple(static_cast<int>(status), rows);
           })
      .def_readwrite("unchanged", &DpaiLoop::unchanged)
      .def_property_readonly("layer_at_fault", &DpaiLoop::layer_at_fault);

  py::class_<PathRounds>(m, "PathRounds")
      .def(
          py::init([](PathFlow &flow, const std::vector<std::tuple<int64_t, uintptr_t, uintptr_t>> &layers, int power) {
            std::vector<paikern::RoundsLayer> made;
            for (const auto &[step, first, second] : layers) {
              made.push_back({step, {pointer<uint8_t>(first), pointer<uint8_t>(second)}});
            }
            return std::make_unique<PathRounds>(flow, std::move(made), power);
          }),
          py::keep_alive<1, 2>())
      .def("run",
           [](PathRounds &rounds, int64_t done, const std::vector<std::vector<int64_t>> &counts, double seconds,
              bool stop_empty) {
             std::vector<double> log_flows;
             paikern::RoundsStatus status;
             {
               const py::gil_scoped_release release;
               status = rounds.run(done, counts, seconds, stop_empty, &log_flows);
             }
             return std::make_pair(static_cast<int>(status), log_flows);
           })
      .def("begin",
           [](PathRounds &rounds) {
             double log_flow = 0.0;
             paikern::RoundsStatus status;
             {
               const py::gil_scoped_release release;
               status = rounds.begin(&log_flow);
             }
             return std::make_pair(static_cast<int>(status), log_flow);
           })
      .def(
          "finish",
          [](PathRounds &rounds, const std::vector<int64_t> &counts, bool stop_empty) {
            return static_cast<int>(rounds.finish(counts, stop_empty));
          },
          py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("current", &PathRounds::current)
      .def_property_readonly("streamed", &PathRounds::streamed)
      .def_property_readonly("layer_at_fault", &PathRounds::layer_at_fault);
}

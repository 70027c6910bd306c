// Bindings of csrc/cpu/phew.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "phew.h"

namespace py = pybind11;

namespace {

// data, type, rows, cols, taps, groups, transposed, base, by_row, by_col
using Row = std::array<int64_t, 10>;

std::vector<paikern::WalkWeight> walk_weights(const std::vector<Row> &rows) {
  std::vector<paikern::WalkWeight> weights;
  for (const auto &[data, type, rows_, cols, taps, groups, transposed, base, by_row, by_col] : rows) {
    weights.push_back({reinterpret_cast<const void *>(data), static_cast<int>(type), rows_, cols, taps, groups,
                       transposed != 0, base, by_row, by_col});
  }
  return weights;
}

template <class T>
const T *at(int64_t address) {
  return reinterpret_cast<const T *>(address);
}

}  // namespace

void bind_phew(py::module_ &m) {
  m.def("phew_tables", [](const std::vector<Row> &rows, int weighting, uintptr_t tables) {
    paikern::phew_tables(walk_weights(rows), weighting, reinterpret_cast<float *>(tables));
  });
  // graph: nodes, slots, links, index, owner, starts, inputs, outputs, output node
  m.def("phew_walks",
        [](const std::vector<Row> &rows, int64_t tables, const std::array<int64_t, 9> &graph, uint64_t seed,
           int64_t first, int64_t count, int64_t width, int weighting, bool whole, uintptr_t out) {
          const paikern::WalkGraph walk_graph = {at<int64_t>(graph[0]),
                                                 at<int64_t>(graph[1]),
                                                 at<int64_t>(graph[2]),
                                                 at<int32_t>(graph[3]),
                                                 at<int32_t>(graph[4]),
                                                 at<int32_t>(graph[5]),
                                                 graph[6],
                                                 graph[7],
                                                 graph[8]};
          paikern::phew_walks(walk_weights(rows), at<float>(tables), walk_graph, seed, first, count, width, weighting,
                              whole, reinterpret_cast<int64_t *>(out));
        });
  m.def("phew_keep", [](uintptr_t bits, uintptr_t state, int64_t walks, int64_t count, int64_t width, int64_t target,
                        int64_t stall, bool exact) {
    paikern::phew_keep(reinterpret_cast<uint8_t *>(bits), *reinterpret_cast<paikern::WalkState *>(state),
                       at<int64_t>(walks), count, width, target, stall, exact);
  });
}

// Bindings of csrc/cpu/pattern.h: scores arrive as rows of integers, strides in elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "pattern.h"

namespace py = pybind11;
using paikern::NmSource;
using paikern::PatternScores;
using paikern::PatternType;

namespace {

using Sizes = std::vector<int64_t>;
// data, type, sizes, strides, absolute; a, g and candidates of factored scores, else 0; power
using ScoreRow = std::tuple<uintptr_t, int, Sizes, Sizes, bool, uintptr_t, uintptr_t, uintptr_t, int>;
// scores, axis, inner, bits
using NmRow = std::tuple<ScoreRow, int64_t, int64_t, uintptr_t>;

template <class T>
T *pointer(uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

PatternScores scores_of(const ScoreRow &row) {
  const auto &[data, type, sizes, strides, absolute, a, g, candidates, power] = row;
  return {pointer<const void>(data),
          static_cast<PatternType>(type),
          sizes,
          strides,
          absolute,
          pointer<const float>(a),
          pointer<const float>(g),
          sizes.empty() ? 1 : sizes.back(),
          power,
          pointer<const uint8_t>(candidates)};
}

}  // namespace

void bind_patterns(py::module_ &m) {
  m.def("nm_mask", [](const std::vector<NmRow> &rows, int64_t n, int64_t group) {
    std::vector<NmSource> sources;
    sources.reserve(rows.size());
    for (const auto &[scores, axis, inner, bits] : rows) {
      sources.push_back({scores_of(scores), axis, inner, pointer<uint8_t>(bits)});
    }
    const py::gil_scoped_release release;
    return paikern::nm_mask(sources, n, group);
  });
  m.def("block_means", [](const ScoreRow &row, int64_t columns, int64_t high, int64_t wide, uintptr_t means) {
    const PatternScores scores = scores_of(row);
    const py::gil_scoped_release release;
    return paikern::block_means(scores, columns, high, wide, pointer<double>(means));
  });
  m.def("expand_blocks",
        [](uintptr_t blocks, int64_t rows, int64_t columns, int64_t high, int64_t wide, uintptr_t bits) {
          const py::gil_scoped_release release;
          paikern::expand_blocks(pointer<const uint8_t>(blocks), rows, columns, high, wide, pointer<uint8_t>(bits));
        });
}

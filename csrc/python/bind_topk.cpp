// Bindings of csrc/cpu/topk.h: tensors arrive as rows of integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "topk.h"

namespace py = pybind11;
using paikern::Ranking;
using paikern::ScoreSource;
using paikern::ScoreType;

namespace {

// data, type, numel, exponent, bits
using DenseRow = std::tuple<uintptr_t, int, int64_t, int64_t, uintptr_t>;
// weight, type, rows, columns, exponent, a, g, candidates, bits
using FactoredRow = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

template <class T>
T *pointer(uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

std::vector<ScoreSource> dense_sources(const std::vector<DenseRow> &rows, bool absolute) {
  std::vector<ScoreSource> sources;
  sources.reserve(rows.size());
  for (const auto &[data, type, numel, exponent, bits] : rows) {
    sources.push_back({pointer<const void>(data), static_cast<ScoreType>(type), numel, absolute, exponent, nullptr,
                       nullptr, 0, 1, nullptr, pointer<uint8_t>(bits)});
  }
  return sources;
}

std::vector<Ranking> rankings(const std::vector<int64_t> &k, size_t tensors) {
  if (k.size() == 1 && tensors != 1) return {{0, static_cast<int64_t>(tensors), k[0]}};
  std::vector<Ranking> each;
  for (size_t l = 0; l < k.size(); ++l) {
    each.push_back({static_cast<int64_t>(l), static_cast<int64_t>(l) + 1, k[l]});
  }
  return each;
}

}  // namespace

void bind_topk(py::module_ &m) {
  m.def("topk_mask", [](const std::vector<DenseRow> &rows, const std::vector<int64_t> &k, bool absolute) {
    const auto sources = dense_sources(rows, absolute);
    const auto groups = rankings(k, rows.size());
    py::gil_scoped_release release;
    return paikern::topk_mask(sources, groups);
  });
  m.def("topk_mask_factored", [](const std::vector<FactoredRow> &rows, const std::vector<int64_t> &k, int power) {
    std::vector<ScoreSource> sources;
    sources.reserve(rows.size());
    for (const auto &[weight, type, height, width, exponent, a, g, candidates, bits] : rows) {
      sources.push_back({pointer<const void>(weight), static_cast<ScoreType>(type), height * width, false, exponent,
                         pointer<const float>(a), pointer<const float>(g), width, power,
                         pointer<const uint8_t>(candidates), pointer<uint8_t>(bits)});
    }
    const auto groups = rankings(k, rows.size());
    py::gil_scoped_release release;
    return paikern::topk_mask(sources, groups);
  });
  m.def("kth_largest", [](const std::vector<DenseRow> &rows, int64_t k) {
    const auto sources = dense_sources(rows, false);
    int64_t nan = -1;
    double value;
    {
      py::gil_scoped_release release;
      value = paikern::kth_largest(sources, k, &nan);
    }
    return std::make_pair(value, nan);
  });
}

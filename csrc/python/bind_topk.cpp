// Bindings of csrc/cpu/topk.h: tensors arrive as rows of integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <tuple>
#include <variant>

#include "geometry.h"
#include "path_score_tiles.h"
#include "topk.h"

namespace py = pybind11;
using paikern::Ranking;
using paikern::ScoreLayout;
using paikern::ScoreSource;
using paikern::ScoreType;

namespace {

// data, type, and (sizes, strides) where the tensor is not contiguous
using View = std::tuple<uintptr_t, int, std::optional<std::pair<std::vector<int64_t>, std::vector<int64_t>>>>;
// scores, numel, exponent, candidates, bits
using DenseRow = std::tuple<View, int64_t, int64_t, uintptr_t, uintptr_t>;
// weight, rows, columns, exponent, a, g, candidates, bits
using FactoredRow = std::tuple<View, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;
// geometry, weight, its type, exponent, maps x and g, candidates, bits
using MappedRow =
    std::tuple<const paikern::python::Geometry *, uintptr_t, int, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;
// weight, gradient, numel, candidates, bits
using ProductRow = std::tuple<View, View, int64_t, uintptr_t, uintptr_t>;

template <class T>
T *pointer(uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

// Owns the layouts that its sources point at.
class Sources {
 public:
  explicit Sources(size_t count) {
    list.reserve(count);
    layouts_.reserve(2 * count);
  }

  ScoreSource &add(int64_t numel, uintptr_t candidates, uintptr_t bits) {
    ScoreSource &source = list.emplace_back();
    source.numel = numel;
    source.candidates = pointer<const uint8_t>(candidates);
    source.bits = pointer<uint8_t>(bits);
    return source;
  }

  void view(const View &from, const void **data, ScoreType *type, const ScoreLayout **layout) {
    *data = pointer<const void>(std::get<0>(from));
    *type = static_cast<ScoreType>(std::get<1>(from));
    if (const auto &shape = std::get<2>(from)) {
      layouts_.push_back(paikern::coalesce(shape->first, shape->second));
      const ScoreLayout &made = layouts_.back();
      const bool contiguous = made.sizes.empty() || (made.sizes.size() == 1 && made.strides[0] == 1);
      *layout = contiguous ? nullptr : &made;
    }
  }

  void tiles(ScoreSource &source, const MappedRow &row, int power) {
    const auto &[geometry, weight, type, exponent, x, g, candidates, bits] = row;
    source.exponent = exponent;
    if (source.numel == 0) return;
    const paikern::WeightView view{pointer<const void>(weight), pointer<const uint8_t>(candidates), source.numel,
                                   static_cast<paikern::WeightType>(type), power};
    tiles_.push_back(std::make_unique<paikern::PathScoreTiles>(geometry->value, view, pointer<const float>(x),
                                                               pointer<const float>(g)));
    source.tiles = tiles_.back().get();
  }

  std::vector<ScoreSource> list;

 private:
  std::vector<std::unique_ptr<paikern::ScoreTiles>> tiles_;
  std::vector<ScoreLayout> layouts_;
};

Sources dense_sources(const std::vector<DenseRow> &rows, bool absolute) {
  Sources sources(rows.size());
  for (const auto &[scores, numel, exponent, candidates, bits] : rows) {
    ScoreSource &source = sources.add(numel, candidates, bits);
    sources.view(scores, &source.data, &source.type, &source.layout);
    source.absolute = absolute;
    source.exponent = exponent;
  }
  return sources;
}

int64_t select(const Sources &sources, const std::vector<int64_t> &k, uintptr_t memory) {
  std::vector<Ranking> rankings;
  auto *remembered = pointer<double>(memory);
  const auto tensors = static_cast<int64_t>(sources.list.size());
  if (k.size() == 1 && tensors != 1) {
    rankings.push_back({0, tensors, k[0], remembered});
  } else {
    for (int64_t l = 0; l < tensors; ++l) {
      rankings.push_back({l, l + 1, k[static_cast<size_t>(l)], remembered ? remembered + 2 * l : nullptr});
    }
  }
  const py::gil_scoped_release release;
  return paikern::topk_mask(sources.list, rankings);
}

}  // namespace

void bind_topk(py::module_ &m) {
  m.def("topk_mask", [](const std::vector<DenseRow> &rows, const std::vector<int64_t> &k, bool absolute,
                        uintptr_t memory) { return select(dense_sources(rows, absolute), k, memory); });
  m.def("topk_mask_product", [](const std::vector<ProductRow> &rows, const std::vector<int64_t> &k) {
    Sources sources(rows.size());
    for (const auto &[weight, gradient, numel, candidates, bits] : rows) {
      ScoreSource &source = sources.add(numel, candidates, bits);
      sources.view(weight, &source.data, &source.type, &source.layout);
      sources.view(gradient, &source.other, &source.other_type, &source.other_layout);
    }
    return select(sources, k, 0);
  });
  m.def("topk_mask_factored",
        [](const std::vector<std::variant<FactoredRow, MappedRow>> &rows, const std::vector<int64_t> &k, int power) {
          Sources sources(rows.size());
          for (const auto &row : rows) {
            if (const auto *mapped = std::get_if<MappedRow>(&row)) {
              const paikern::PathGeometry &geometry = std::get<0>(*mapped)->value;
              sources.tiles(sources.add(geometry.rows * geometry.depth(), 0, std::get<7>(*mapped)), *mapped, power);
              continue;
            }
            const auto &[weight, height, width, exponent, a, g, candidates, bits] = std::get<FactoredRow>(row);
            ScoreSource &source = sources.add(height * width, candidates, bits);
            sources.view(weight, &source.data, &source.type, &source.layout);
            source.exponent = exponent;
            source.a = pointer<const float>(a);
            source.g = pointer<const float>(g);
            source.columns = width;
            source.power = power;
          }
          return select(sources, k, 0);
        });
  m.def("kth_largest", [](const std::vector<DenseRow> &rows, int64_t k) {
    const Sources sources = dense_sources(rows, false);
    int64_t nan = -1;
    double value;
    {
      const py::gil_scoped_release release;
      value = paikern::kth_largest(sources.list, k, &nan);
    }
    return std::make_pair(value, nan);
  });
}

// From positions to offsets, once a call: 4 bytes an entry, next to 64 a vector that the entry then reads.
#include "masked_conv_lists.h"

#include <algorithm>

namespace paikern {
namespace {

constexpr int64_t kColumns = int64_t{1} << 16;  // that 16 bits can tell apart

// Calls visit(column of V, entry) for the entries of row r with first <= column < last.
template <class Visit>
void each_entry(const ConvEntries &v, int64_t r, int64_t first, int64_t last, Visit visit) {
  for (int64_t p = first / v.panel; p < v.panels() && p * v.panel < last; ++p) {
    const int64_t base = p * v.panel / kColumns * kColumns;
    const int32_t *start = v.starts + r * v.panels() + p;
    const uint16_t *from = v.positions + start[0], *to = v.positions + start[1];
    // Within a panel positions ascend; one that lies whole in the range needs no search.
    if (first > p * v.panel) from = std::lower_bound(from, to, static_cast<uint16_t>(first - base));
    for (; from < to && base + *from < last; ++from) visit(base + *from, from - v.positions);
  }
}

}  // namespace

std::vector<int64_t> ConvLists::split(int64_t parts) const {
  std::vector<int64_t> cuts{0};
  for (int64_t p = 1; p <= parts; ++p) {
    const auto at = std::lower_bound(begins_.begin(), begins_.end(), kept() * p / parts);
    const int64_t cut = p == parts ? count() : at - begins_.begin();
    if (cut > cuts.back()) cuts.push_back(cut);
  }
  return cuts;
}

ConvLists forward_lists(const ConvEntries &v, const ConvShape &shape, const ForwardPlan &plan) {
  const int64_t grids = static_cast<int64_t>(plan.planes.size()), span = plan.lattice.span;
  std::vector<int32_t> table;
  for (int64_t c = 0; c < shape.channels / shape.groups; ++c) {
    for (const Tap &tap : plan.taps) table.push_back(static_cast<int32_t>((c * grids + tap.phase) * span + tap.shift));
  }
  std::vector<int64_t> begins{0};
  for (int64_t r = 0; r < v.rows; ++r) begins.push_back(v.columns ? v.starts[(r + 1) * v.panels()] : 0);
  ConvLists lists(std::move(begins), v.values);
  const int64_t kept = lists.kept();
#pragma omp parallel for schedule(static) if (kept > parallel_work() / 8)
  for (int64_t r = 0; r < v.rows; ++r) {
    int32_t *to = lists.offsets(r);
    if (v.columns <= kColumns) {
      const int64_t end = lists.begin(r + 1);
      for (int64_t i = lists.begin(r); i < end; ++i) *to++ = table[v.positions[i]];
    } else {
      each_entry(v, r, 0, v.columns, [&](int64_t column, int64_t) { *to++ = table[static_cast<size_t>(column)]; });
    }
  }
  return lists;
}

ConvLists input_lists(const ConvEntries &v, const ConvShape &shape, const BackwardPlan &plan) {
  const int64_t phases = static_cast<int64_t>(plan.phases.size()), taps = shape.taps();
  const int64_t group_rows = shape.rows / shape.groups, group_channels = shape.channels / shape.groups;
  const int64_t span = plan.lattice.span, count = shape.channels * phases;
  const auto each = [&](int64_t list, auto visit) {
    const int64_t channel = list / phases, group = channel / group_channels;
    for (const Tap &tap : plan.phases[static_cast<size_t>(list % phases)].taps) {
      const int64_t row = channel % group_channels * taps + tap.index, first = group * group_rows;
      each_entry(v, row, first, first + group_rows, [&](int64_t o, int64_t entry) {
        visit(static_cast<int32_t>((o - first) * span + tap.shift), v.source ? v.source[entry] : entry);
      });
    }
  };
  const bool parallel = v.kept() > parallel_work() / 8;
  std::vector<int64_t> begins(static_cast<size_t>(count) + 1, 0);
  if (phases == 1 && shape.groups == 1) {  // a list is what `taps` rows of V^T hold
    for (int64_t i = 1; i <= count; ++i) begins[static_cast<size_t>(i)] = v.starts[i * taps * v.panels()];
  } else {
#pragma omp parallel for schedule(static) if (parallel)
    for (int64_t i = 0; i < count; ++i) {
      int64_t found = 0;
      each(i, [&](int32_t, int64_t) { ++found; });
      begins[static_cast<size_t>(i) + 1] = found;
    }
    for (size_t i = 0; i < static_cast<size_t>(count); ++i) begins[i + 1] += begins[i];
  }
  ConvLists lists(std::move(begins), nullptr);
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t i = 0; i < count; ++i) {
    int32_t *offsets = lists.offsets(i);
    float *values = lists.values(i);
    each(i, [&](int32_t offset, int64_t from) {
      *offsets++ = offset;
      *values++ = v.values[from];
    });
  }
  return lists;
}

}  // namespace paikern

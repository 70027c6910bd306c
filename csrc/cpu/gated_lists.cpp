#include "gated_lists.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "path_plan.h"

namespace paikern {
namespace {

// Bytes of the planes that one part of the columns reads for a block of 8 x 2 units: 16 channels of a 3 x 3
// convolution. With 32 of them sums run 1.4 times as slow, with 8 no faster.
constexpr int64_t kWindow = 40 << 10;

constexpr int kCodes = 1 << kGatedQuad;

// How many places the sums of a class of a quad are added to, see gated_quad.
constexpr int kPlaces[kCodes] = {0, 0, 0, 1, 0, 2, 2, 2, 0, 2, 2, 2, 1, 2, 2, 2};

// Classes as they are listed.
constexpr int kOrder[kCodes - 1] = {3, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 1, 2, 4, 8};

// Columns a part that a row lists at least.
constexpr int64_t kPartColumns = 12;

// What it takes to add one class of a quad to one place, in columns: a load, an add and a store.
constexpr double kClassCost = 1.5;

}  // namespace

GatedLists::GatedLists(const GatedStep &step, const GatedMap &in, const GatedMap &out, const GatedLattice &from,
                       const GatedLattice &to)
    : step_(step), in_(in), out_(out), to_(to) {
  if (step.kind != GatedKind::kWeight && step.kind != GatedKind::kElementwise) return;
  flat_ = to.flat();
  if (step.kind == GatedKind::kElementwise) {  // every channel a group with one weight of 1
    step_.groups = out.channels;
    group_stride_ = to.span;
    offset_of_.push_back(0);
    const std::vector<float> ones(static_cast<size_t>(out.channels), 1.0f);
    load(ones.data(), nullptr, nullptr, nullptr);
    return;
  }
  direct_ = from.rows == step.stride[0] * to.rows && step.stride[1] <= 2;
  flat_ = flat_ && (!direct_ || (from.flat() && in.h == out.h && in.w == out.w));
  const int64_t channels = in.channels / step.groups;
  taps_ = step.kernel[0] * step.kernel[1];
  std::vector<int64_t> plane_of, shifts;
  for (int64_t i = 0; i < step.kernel[0]; ++i) {
    for (int64_t j = 0; j < step.kernel[1]; ++j) {
      if (direct_) {
        const int64_t y = i * step.dilation[0] - step.padding[0], x = j * step.dilation[1] - step.padding[1];
        shifts.push_back((y * from.pitch + x) * kGatedUnit);
        plane_of.push_back(0);
        continue;
      }
      const AxisTap y = axis_tap(step, 0, i), x = axis_tap(step, 1, j);
      shifts.push_back((y.shift * to.pitch + x.shift) * kGatedUnit);
      moves_rows_ = moves_rows_ || y.shift != 0;
      size_t at = 0;
      while (at < planes_.size() && (planes_[at].phase_y != y.phase || planes_[at].phase_x != x.phase)) ++at;
      if (at == planes_.size()) planes_.push_back({y.phase, x.phase});
      plane_of.push_back(static_cast<int64_t>(at));
    }
  }
  const int64_t planes = direct_ ? 1 : static_cast<int64_t>(planes_.size()), span = direct_ ? from.span : to.span;
  const int64_t stride = planes * span;
  depth_ = channels * taps_;
  group_stride_ = channels * stride;
  if (in.channels * stride > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("gated: a map is too large for 32-bit offsets");
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (size_t t = 0; t < static_cast<size_t>(taps_); ++t) {
      offset_of_.push_back(static_cast<int32_t>(c * stride + plane_of[t] * span + shifts[t]));
    }
  }
  const int64_t columns = std::min<int64_t>(8, flat_ ? to.groups * to.rows * to.w : to.w);
  const int64_t rows = flat_ ? 1 : std::min<int64_t>(2, to.rows);
  const auto extent = [&](int axis, int64_t outputs) {
    if (direct_) return (outputs - 1) * step.stride[axis] + (step.kernel[axis] - 1) * step.dilation[axis] + 1;
    return outputs + axis_tap(step, axis, step.kernel[axis] - 1).shift - axis_tap(step, axis, 0).shift;
  };
  const int64_t window = std::min(taps_ * columns * rows, planes * extent(0, rows) * extent(1, columns));
  most_parts_ = divide_up(channels * window * kGatedUnit * static_cast<int64_t>(sizeof(float)), kWindow);
  most_parts_ = std::min(most_parts_, channels);
}

void GatedLists::fill_phases(const GatedKernels &kernels, const GatedLattice &from, const float *map,
                             float *planes) const {
  const int64_t sh = step_.stride[0], sw = step_.stride[1];
  const bool aligned = from.rows == sh * to_.rows;  // rows of a strip end in the same strip
  for (int64_t c = 0; c < in_.channels; ++c) {
    const float *source = map + c * from.span;
    for (size_t p = 0; p < planes_.size(); ++p) {
      const Plane &plane = planes_[p];
      const int64_t columns = divide_up(in_.w - plane.phase_x, sw);
      float *target = planes + (c * static_cast<int64_t>(planes_.size()) + static_cast<int64_t>(p)) * to_.span;
      if (aligned) {
        for (int64_t group = 0; group < to_.groups; ++group) {
          for (int64_t row = 0; row < to_.rows; ++row) {
            const float *line = source + from.origin(group, row * sh + plane.phase_y) + plane.phase_x * kGatedUnit;
            float *to = target + to_.origin(group, row);
            for (int64_t x = 0; x < columns; ++x) {
              std::memcpy(to + x * kGatedUnit, line + x * sw * kGatedUnit, sizeof(float) * kGatedUnit);
            }
          }
        }
        continue;
      }
      for (int64_t n = 0; n < to_.samples(); ++n) {
        for (int64_t y = plane.phase_y, row = 0; y < in_.h; y += sh, ++row) {
          const float *line = source + from.at(n, y, plane.phase_x);
          float *to = target + to_.at(n, row, 0);
          for (int64_t x = 0; x < columns; ++x) to[x * kGatedUnit] = line[x * sw * kGatedUnit];
        }
      }
    }
  }
  if (moves_rows_) to_.fill_shared(kernels, in_.channels * static_cast<int64_t>(planes_.size()), planes);
}

void GatedLists::load(const float *theta, const uint8_t *mask, const float *scale, const float *shift) {
  const size_t rows = static_cast<size_t>(out_.channels);
  scale_.assign(rows, 1.0f);
  shift_.assign(rows, 0.0f);
  if (scale) std::memcpy(scale_.data(), scale, sizeof(float) * rows);
  if (shift) std::memcpy(shift_.data(), shift, sizeof(float) * rows);
  if (!theta) return;
  std::vector<uint8_t> kept(rows * static_cast<size_t>(depth_), 1);
  if (mask) {
    const size_t whole = kept.size() / 8;
    for (size_t byte = 0; byte < whole; ++byte) {
      for (size_t bit = 0; bit < 8; ++bit) kept[8 * byte + bit] = mask[byte] >> bit & 1;
    }
    for (size_t i = 8 * whole; i < kept.size(); ++i) kept[i] = mask[i >> 3] >> (i & 7) & 1;
  }
  codes_.resize(static_cast<size_t>(depth_));
  sorted_.resize(static_cast<size_t>(depth_));
  const int64_t count = std::count(kept.begin(), kept.end(), uint8_t{1});
  values_.parts = parts_of(count);
  paths_.parts = parts_of(std::min(count, static_cast<int64_t>(kept.size()) - count));
  list_values(theta, kept.data());
  list_paths(kept.data());
}

// Where a row lists few columns of a part, loading them from the second cache takes less than to keep its sums.
int64_t GatedLists::parts_of(int64_t listed) const {
  return std::clamp<int64_t>(listed / (kPartColumns * out_.channels), 1, most_parts_);
}

void GatedLists::list_values(const float *theta, const uint8_t *kept) {
  const int64_t group_rows = out_.channels / step_.groups;
  values_.begin.clear();
  values_.lists.clear();
  values_.offsets.clear();
  values_.values.clear();
  for (int64_t group = 0; group < step_.groups; ++group) {
    for (int64_t index = 0; index < values_.parts; ++index) {
      values_.begin.push_back(static_cast<int64_t>(values_.lists.size()));
      const int64_t end = (group + 1) * group_rows;
      for (int64_t r = group * group_rows; r < end;) {
        list_kept(theta, kept, r, end, index);
        r += values_.lists.back().rows;
      }
    }
  }
  values_.begin.push_back(static_cast<int64_t>(values_.lists.size()));
}

// Columns of a part in the order of their codes, and how many have each of the 1 << kGatedQuad codes.
void GatedLists::sort_part(int64_t first, int64_t end, int64_t *counts) {
  const uint8_t *codes = codes_.data();
  int32_t *sorted = sorted_.data();
  // Both halves side by side: most codes are often 0, and one counter would wait for itself.
  const int64_t half = (end - first) / 2, middle = first + half;
  int64_t behind[kCodes] = {};
  std::fill(counts, counts + kCodes, 0);
  for (int64_t i = first; i < middle; ++i) {
    ++counts[codes[i]];
    ++behind[codes[i + half]];
  }
  if (middle + half < end) ++behind[codes[end - 1]];
  int64_t next[kCodes], later[kCodes], place = 0;
  for (int code = 0; code < kCodes; ++code) {
    next[code] = place;
    later[code] = place + counts[code];
    counts[code] += behind[code];
    place += counts[code];
  }
  for (int64_t i = first; i < middle; ++i) {
    sorted[next[codes[i]]++] = static_cast<int32_t>(i);
    sorted[later[codes[i + half]]++] = static_cast<int32_t>(i + half);
  }
  if (middle + half < end) sorted[later[codes[end - 1]]] = static_cast<int32_t>(end - 1);
}

// The next row before `end`, or the next two where they have enough in common: loads of a block of 8 x 2 units.
void GatedLists::list_kept(const float *theta, const uint8_t *kept, int64_t row, int64_t end, int64_t index) {
  const bool last = row + 1 == end;
  const int64_t begin = part(index, values_.parts), behind = part(index + 1, values_.parts);
  mark(kept, row, last ? 1 : 2, begin, behind);
  int64_t counts[kCodes];
  sort_part(begin, behind, counts);
  const int64_t alone = counts[1] + counts[2], both = counts[3];
  const bool together = !last && 2 * (11 * both + 10 * alone) < 18 * (alone + 2 * both);
  Kept list{row,
            together ? 2 : 1,
            static_cast<int64_t>(values_.offsets.size()),
            static_cast<int64_t>(values_.values.size()),
            {}};
  const int32_t *columns = sorted_.data() + counts[0];
  const auto take = [&](int which, int code, bool first, bool second) {
    const int32_t *from = columns + (code > 1 ? counts[1] : 0) + (code > 2 ? counts[2] : 0);
    list.counts[which] += static_cast<int32_t>(counts[code]);
    for (int64_t k = 0; k < counts[code]; ++k) {
      values_.offsets.push_back(offset_of_[static_cast<size_t>(from[k])]);
      if (first) values_.values.push_back(theta[row * depth_ + from[k]]);
      if (second) values_.values.push_back(theta[(row + 1) * depth_ + from[k]]);
    }
  };
  if (together) {
    take(0, 3, true, true);
    take(1, 1, true, false);
    take(2, 2, false, true);
  } else {
    take(1, 1, true, false);
    take(1, 3, true, false);
  }
  values_.lists.push_back(list);
}

void GatedLists::list_paths(const uint8_t *kept) {
  const int64_t group_rows = out_.channels / step_.groups;
  paths_.items.clear();
  paths_.group.clear();
  paths_.begin.clear();
  paths_.first.clear();
  paths_.offsets.clear();
  paths_.classes.clear();
  for (int64_t group = 0; group < step_.groups; ++group) {
    paths_.group.push_back(static_cast<int64_t>(paths_.items.size()));
    const int64_t end = (group + 1) * group_rows;
    for (int64_t r = group * group_rows; r < end;) {
      const int64_t together = std::min(kGatedQuad, end - r);
      double alone = 0.0, joint = 0.0;
      std::array<Item, kGatedQuad> single;
      for (int64_t k = 0; k < together; ++k) {
        int64_t count = 0;
        for (int64_t i = 0; i < depth_; ++i) count += kept[(r + k) * depth_ + i];
        // The sum of all columns is shared by the rows of the group.
        const int64_t otherwise = depth_ - count + depth_ / group_rows;
        single[static_cast<size_t>(k)] = {r + k, 1, otherwise < count};
        alone += static_cast<double>(std::min(count, otherwise));
      }
      const Item item = together == kGatedQuad ? quad(kept, r, &joint) : Item{};
      if (together == kGatedQuad && joint < alone) {
        paths_.items.push_back(item);
      } else {
        paths_.items.insert(paths_.items.end(), single.begin(), single.begin() + together);
      }
      r += together;
    }
  }
  paths_.group.push_back(static_cast<int64_t>(paths_.items.size()));
  paths_.begin.push_back(0);
  paths_.first.push_back(0);
  for (const Item &item : paths_.items) list_item(item, kept);
}

// Four rows together as they are best listed, and what that costs in columns.
GatedLists::Item GatedLists::quad(const uint8_t *kept, int64_t row, double *cost) {
  double costs[2] = {0.0, static_cast<double>(kGatedQuad * depth_ * step_.groups / out_.channels)};
  for (int64_t index = 0; index < paths_.parts; ++index) {
    int64_t count[kCodes];
    const int64_t first = part(index, paths_.parts), end = part(index + 1, paths_.parts);
    mark(kept, row, kGatedQuad, first, end);
    sort_part(first, end, count);
    for (int pruned = 0; pruned < 2; ++pruned) {
      for (int code = 1; code < kCodes; ++code) {
        const int64_t columns = count[pruned ? kCodes - 1 - code : code];
        if (columns) costs[pruned] += static_cast<double>(columns) + kClassCost * kPlaces[code];
      }
    }
  }
  const bool pruned = costs[1] < costs[0];
  *cost = costs[pruned];
  return {row, kGatedQuad, pruned};
}

// Which of `rows` rows keep each column of a part.
void GatedLists::mark(const uint8_t *kept, int64_t row, int64_t rows, int64_t first, int64_t end) {
  const int64_t count = end - first;
  const uint8_t *__restrict from = kept + row * depth_ + first;
  uint8_t *__restrict codes = codes_.data() + first;
  std::memcpy(codes, from, static_cast<size_t>(count));
  for (int64_t k = 1; k < rows; ++k) {
    from += depth_;
    for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(codes[i] | from[i] << k);
  }
}

void GatedLists::list_item(const Item &item, const uint8_t *kept) {
  const int all = (1 << item.rows) - 1;
  for (int64_t index = 0; index < paths_.parts; ++index) {
    int64_t counts[kCodes];
    const int64_t first = part(index, paths_.parts), end = part(index + 1, paths_.parts);
    mark(kept, item.row, item.rows, first, end);
    sort_part(first, end, counts);
    int64_t start[kCodes + 1] = {};
    for (int code = 0; code < kCodes; ++code) start[code + 1] = start[code] + counts[code];
    for (const int rows : kOrder) {
      if (rows > all) continue;
      const int code = item.pruned ? all - rows : rows;
      if (counts[code] == 0) continue;
      for (int64_t k = start[code]; k < start[code + 1]; ++k) {
        paths_.offsets.push_back(offset_of_[static_cast<size_t>(sorted_[static_cast<size_t>(k)])]);
      }
      paths_.classes.push_back({static_cast<uint32_t>(rows), static_cast<int32_t>(counts[code])});
    }
    paths_.begin.push_back(static_cast<int64_t>(paths_.offsets.size()));
    paths_.first.push_back(static_cast<int64_t>(paths_.classes.size()));
  }
}

void GatedLists::run_values(const GatedKernels &kernels, const GatedBlock &block, float *scratch) const {
  const int64_t group_rows = out_.channels / step_.groups, each = block.columns * block.rows * kGatedUnit;
  for (int64_t group = 0; group < step_.groups; ++group) {
    for (int64_t index = 0; index < values_.parts; ++index) {
      GatedBlock b = block;
      b.base += group * group_stride_;
      b.last = index == values_.parts - 1;
      const size_t at = static_cast<size_t>(group * values_.parts + index);
      for (int64_t i = values_.begin[at]; i < values_.begin[at + 1]; ++i) {
        const Kept &list = values_.lists[static_cast<size_t>(i)];
        const int32_t *offsets = values_.offsets.data() + list.offset;
        const float *values = values_.values.data() + list.value;
        const float *scale = scale_.data() + list.row, *shift = shift_.data() + list.row;
        b.sums = scratch + (list.row - group * group_rows) * each;
        b.from = index == 0 ? kGatedZeros : b.sums;
        b.out = block.out + list.row * b.channel;
        if (b.add) b.add = block.add + list.row * b.channel;
        if (b.open) b.open = block.open + list.row * b.channel / kGatedUnit * kernels.gate_bytes;
        if (list.rows == 1) {
          kernels.values(b, offsets, values, list.counts[1], *scale, *shift);
        } else {
          kernels.pair(b, offsets, values, list.counts, scale, shift);
        }
      }
    }
  }
}

float GatedLists::run_paths(const GatedKernels &kernels, const GatedBlock &block, float scale, float *scratch) const {
  const int64_t group_rows = out_.channels / step_.groups, each = block.columns * block.rows * kGatedUnit;
  const bool whole = paths_.parts == 1;  // no sums are kept from item to item: they may share a place
  float *all = scratch + (whole ? std::min(group_rows, kGatedQuad) : group_rows) * each;
  float top = 0.0f;
  for (int64_t group = 0; group < step_.groups; ++group) {
    const int64_t first = paths_.group[static_cast<size_t>(group)], end = paths_.group[static_cast<size_t>(group) + 1];
    const auto pruned = [](const Item &item) { return item.pruned; };
    const bool any = std::any_of(paths_.items.begin() + first, paths_.items.begin() + end, pruned);
    for (int64_t index = 0; index < paths_.parts; ++index) {
      GatedBlock b = block;
      b.base += group * group_stride_;
      b.last = index == paths_.parts - 1;
      if (any) {
        b.sums = all;
        b.from = index == 0 ? kGatedZeros : all;
        const int64_t from = part(index, paths_.parts), to = part(index + 1, paths_.parts);
        kernels.sum(b, offset_of_.data() + from, to - from);
      }
      for (int64_t i = first; i < end; ++i) {
        const Item &item = paths_.items[static_cast<size_t>(i)];
        const size_t list = static_cast<size_t>(i * paths_.parts + index);
        const int32_t *offsets = paths_.offsets.data() + paths_.begin[list];
        b.sums = scratch + (whole ? 0 : item.row - group * group_rows) * each;
        b.shared = all + each;
        b.from = index == 0 ? kGatedZeros : b.sums;
        b.all = item.pruned ? all : nullptr;
        b.out = block.out + item.row * b.channel;
        if (b.add) b.add = block.add + item.row * b.channel;
        if (b.gate) b.gate = block.gate + item.row * b.channel / kGatedUnit * kernels.gate_bytes;
        const float found = item.rows == 1
                                ? kernels.paths(b, offsets, paths_.begin[list + 1] - paths_.begin[list], scale)
                                : kernels.quad(b, offsets, paths_.classes.data() + paths_.first[list],
                                               paths_.first[list + 1] - paths_.first[list], scale);
        top = std::max(top, found);
      }
    }
  }
  return top;
}

}  // namespace paikern

#include "pattern_load.h"

#include <algorithm>
#include <cstring>

#include "isa.h"

namespace paikern {
namespace {

template <class Word>
void gather(const Word *from, int64_t stride, int64_t count, Word *to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
}

void gather(const uint8_t *from, int64_t stride, int64_t count, int64_t itemsize, uint8_t *to) {
  if (stride == 1) {
    std::memcpy(to, from, static_cast<size_t>(count * itemsize));
  } else if (itemsize == 2) {
    gather(reinterpret_cast<const uint16_t *>(from), stride, count, reinterpret_cast<uint16_t *>(to));
  } else if (itemsize == 4) {
    gather(reinterpret_cast<const uint32_t *>(from), stride, count, reinterpret_cast<uint32_t *>(to));
  } else {
    gather(reinterpret_cast<const uint64_t *>(from), stride, count, reinterpret_cast<uint64_t *>(to));
  }
}

template <class Word>
void turn(const void *data, int64_t stride, int64_t rows, int64_t columns, void *buffer) {
  const Word *from = static_cast<const Word *>(data);
  Word *to = static_cast<Word *>(buffer);
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t row = 0; row < rows; ++row) to[row * columns + column] = from[column * stride + row];
  }
}

int64_t size_of(PatternType type) {
  switch (type) {
    case PatternType::kFloat32:
      return 4;
    case PatternType::kFloat64:
      return 8;
    default:
      return 2;
  }
}

}  // namespace

const PatternInner &pattern_inner() {
  switch (isa()) {
    case Isa::kAvx512:
      return kPatternAvx512;
    case Isa::kAvx2:
      return kPatternAvx2;
    default:
      return kPatternPortable;
  }
}

ScoreReader::ScoreReader(const PatternScores &scores)
    : s_(&scores), factored_(scores.a != nullptr), itemsize_(size_of(scores.type)) {
  for (size_t d = 0; d < scores.sizes.size(); ++d) {
    const int64_t size = scores.sizes[d], stride = scores.strides[d];
    if (size == 1) continue;
    if (!axes_.empty() && axes_.back().stride == size * stride) {
      axes_.back() = {axes_.back().size * size, stride};
    } else {
      axes_.push_back({size, stride});
    }
  }
  if (axes_.size() == 1 && axes_[0].stride == 1) axes_.clear();
}

const void *ScoreReader::stored(int64_t start, int64_t count, void *buffer) const {
  const auto *data = static_cast<const uint8_t *>(s_->data);
  if (axes_.empty()) return data + start * itemsize_;
  auto *to = static_cast<uint8_t *>(buffer);
  int64_t index[kMostAxes], offset = 0, rest = start;
  for (size_t d = axes_.size(); d-- > 0;) {
    index[d] = rest % axes_[d].size;
    rest /= axes_[d].size;
    offset += index[d] * axes_[d].stride;
  }
  const size_t last = axes_.size() - 1;
  while (count > 0) {
    const int64_t run = std::min(count, axes_[last].size - index[last]);
    gather(data + offset * itemsize_, axes_[last].stride, run, itemsize_, to);
    to += run * itemsize_, count -= run;
    offset -= index[last] * axes_[last].stride;
    index[last] = 0;
    for (size_t d = last; d-- > 0;) {  // the next run, counting like a clock
      offset += axes_[d].stride;
      if (++index[d] < axes_[d].size) break;
      offset -= index[d] * axes_[d].stride;
      index[d] = 0;
    }
  }
  return buffer;
}

void ScoreReader::read_across(int64_t row, int64_t rows, int64_t column, int64_t columns, void *buffer) const {
  const int64_t stride = axes_[1].stride;
  const void *from = static_cast<const uint8_t *>(s_->data) + (row + column * stride) * itemsize_;
  if (itemsize_ == 2) {
    turn<uint16_t>(from, stride, rows, columns, buffer);
  } else if (itemsize_ == 4) {
    turn<uint32_t>(from, stride, rows, columns, buffer);
  } else {
    turn<uint64_t>(from, stride, rows, columns, buffer);
  }
}

void ScoreReader::factor(int64_t start, int64_t count, float *values) const {
  for (int64_t done = 0; done < count;) {
    const int64_t row = (start + done) / s_->columns, column = (start + done) % s_->columns;
    const int64_t run = std::min(count - done, s_->columns - column);
    inner_.factored(values + done, s_->a + column, s_->g[row], s_->power == 2, run, values + done);
    done += run;
  }
  if (s_->candidates == nullptr) return;
  for (int64_t i = 0; i < count; ++i) {
    if (((s_->candidates[(start + i) >> 3] >> ((start + i) & 7)) & 1) == 0) values[i] = -1.0f;
  }
}

const void *ScoreReader::read(int64_t start, int64_t count, void *buffer) const {
  return factored_ ? read_wide(start, count, buffer) : stored(start, count, buffer);
}

const void *ScoreReader::read_wide(int64_t start, int64_t count, void *buffer) const {
  alignas(64) uint8_t narrow[kPatternTile * sizeof(double)];
  auto *values = static_cast<float *>(buffer);
  const bool direct = s_->type == PatternType::kFloat32 || (s_->type == PatternType::kFloat64 && !factored_);
  if (direct && !factored_) return stored(start, count, buffer);
  for (int64_t done = 0; done < count; done += kPatternTile) {
    const int64_t some = std::min(count - done, kPatternTile);
    const void *from = stored(start + done, some, narrow);
    if (s_->type == PatternType::kFloat32) {
      std::memcpy(values + done, from, static_cast<size_t>(some) * sizeof(float));
    } else if (s_->type == PatternType::kFloat64) {
      std::copy_n(static_cast<const double *>(from), some, values + done);
    } else {
      inner_.widen(static_cast<const uint16_t *>(from), some, s_->type == PatternType::kFloat16, values + done);
    }
  }
  if (factored_) factor(start, count, values);
  return buffer;
}

BitSpan::BitSpan(uint8_t *bits, int64_t first, int64_t count) : bits_(bits), first_(first), count_(count) {
  const int64_t bytes = ((first & 7) + count + 7) / 8;
  if (bytes > kSmall) large_.resize(static_cast<size_t>(bytes + kPatternPad));
  held_ = bytes > kSmall ? large_.data() : small_;
  std::fill_n(held_, bytes + kPatternPad, uint8_t{0});
}

void BitSpan::store() const {
  if (count_ == 0) return;
  const int64_t first = first_ >> 3, last = (first_ + count_ - 1) >> 3;
  __atomic_fetch_or(bits_ + first, held_[0], __ATOMIC_RELAXED);
  if (last == first) return;
  __atomic_fetch_or(bits_ + last, held_[last - first], __ATOMIC_RELAXED);
  std::copy(held_ + 1, held_ + (last - first), bits_ + first + 1);
}

void BitSpan::clear_ends(uint8_t *bits, int64_t first, int64_t count) {
  if (count == 0) return;
  bits[first >> 3] = 0;
  bits[(first + count - 1) >> 3] = 0;
}

}  // namespace paikern

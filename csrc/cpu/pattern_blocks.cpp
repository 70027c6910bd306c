// Means of rectangular blocks of a matrix, and a bit a block as a bit an element.
//
// Bytes moved: one read of the scores; the means are smaller by the size of a block. Each block is summed in an order
// that pattern.h fixes, so that neither threads nor the instruction set show in the last bit.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "pattern_keys.h"
#include "pattern_load.h"
#include "subnormals.h"

namespace paikern {
namespace {

constexpr int64_t kStrip = 1024;        // columns of one unit of work, more if a block is wider
constexpr int64_t kParallel = 1 << 16;  // elements; below this a thread costs more than it brings
constexpr int64_t kLanes = 8;

int64_t blocks_in(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Some neighbouring blocks of one row of blocks.
struct Strip {
  int64_t row, rows;        // of the matrix
  int64_t column, columns;  // of the matrix
  int64_t wide;             // of a block; the last may be narrower
  double *means;
};

class Adder {
 public:
  Adder(const PatternScores &scores, int64_t columns) : s_(scores), columns_(columns), reader_(scores) {}

  bool means(const Strip &strip) {
    const bool flat = strip.wide < kLanes;  // a sum for each column
    const int64_t blocks = blocks_in(strip.columns, strip.wide);
    sums_.assign(static_cast<size_t>(flat ? strip.columns : blocks * kLanes), 0.0);
    for (int64_t row = strip.row; row < strip.row + strip.rows; ++row) line(strip, row * columns_ + strip.column, flat);
    bool nan = false;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t wide = std::min(strip.wide, strip.columns - block * strip.wide);
      const double *lanes = sums_.data() + block * (flat ? strip.wide : kLanes);
      double sum = lanes[0];
      for (int64_t lane = 1; lane < (flat ? wide : kLanes); ++lane) sum += lanes[lane];
      strip.means[block] = sum / static_cast<double>(strip.rows * wide);
      nan |= std::isnan(strip.means[block]);
    }
    return nan;
  }

 private:
  void line(const Strip &strip, int64_t start, bool flat) {
    double *sums = sums_.data();
    if (flat) {
      for (int64_t done = 0; done < strip.columns; done += kPatternTile) {
        add(start + done, std::min(strip.columns - done, kPatternTile), 0, sums + done);
      }
      return;
    }
    const int64_t whole = strip.columns / strip.wide;
    if (strip.wide <= kPatternTile) {
      const int64_t at_once = kPatternTile / strip.wide;
      for (int64_t block = 0; block < whole; block += at_once) {
        const int64_t count = std::min(at_once, whole - block) * strip.wide;
        add(start + block * strip.wide, count, strip.wide, sums + block * kLanes);
      }
    }
    // What is left is one block: a narrower one at the edge, or one wider than the buffer, in pieces.
    for (int64_t done = strip.wide <= kPatternTile ? whole * strip.wide : 0; done < strip.columns;) {
      const int64_t some = std::min(strip.columns - done, kPatternTile);
      add(start + done, some, some, sums + done / strip.wide * kLanes);
      done += some;
    }
  }

  // wide = 0: a sum for each value, else eight for each `wide` values.
  void add(int64_t start, int64_t count, int64_t wide, double *sums) {
    const void *from = reader_.read_wide(start, count, buffer_);
    if (reader_.type() == PatternType::kFloat64) {
      const auto *values = static_cast<const double *>(from);
      wide == 0 ? inner_.add64(values, count, s_.absolute, sums)
                : inner_.add_blocks64(values, count, wide, s_.absolute, sums);
    } else {
      const auto *values = static_cast<const float *>(from);
      wide == 0 ? inner_.add32(values, count, s_.absolute, sums)
                : inner_.add_blocks32(values, count, wide, s_.absolute, sums);
    }
  }

  const PatternScores &s_;
  const int64_t columns_;
  const ScoreReader reader_;
  const PatternInner &inner_ = pattern_inner();
  std::vector<double> sums_;
  alignas(64) double buffer_[kPatternTile];
};

void set_ones(uint8_t *bits, int64_t at, int64_t count) {
  for (; count > 0 && (at & 7) != 0; ++at, --count) {
    bits[at >> 3] = static_cast<uint8_t>(bits[at >> 3] | (1u << (at & 7)));
  }
  std::memset(bits + (at >> 3), 0xff, static_cast<size_t>(count >> 3));
  at += count & ~int64_t{7};
  bits[at >> 3] = static_cast<uint8_t>(bits[at >> 3] | ((1u << (count & 7)) - 1));
}

}  // namespace

bool block_means(const PatternScores &scores, int64_t columns, int64_t high, int64_t wide, double *means) {
  const int64_t numel = scores.numel();
  if (numel == 0) return false;
  const int64_t rows = numel / columns;
  const int64_t across = blocks_in(columns, wide), down = blocks_in(rows, high);
  const int64_t each = std::max<int64_t>(1, kStrip / wide);  // blocks of a strip
  const int64_t strips = blocks_in(across, each), count = strips * down;
  bool nan = false;
#pragma omp parallel if (numel > kParallel) reduction(|| : nan)
  {
    const SubnormalsCount guard;
    Adder adder(scores, columns);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = i / strips * high, block = i % strips * each;
      const Strip strip{row,          std::min(high, rows - row),
                        block * wide, std::min(each * wide, columns - block * wide),
                        wide,         means + i / strips * across + block};
      nan = adder.means(strip) || nan;
    }
  }
  return nan;
}

void expand_blocks(const uint8_t *blocks, int64_t rows, int64_t columns, int64_t high, int64_t wide, uint8_t *bits) {
  if (rows == 0 || columns == 0) return;
  const int64_t across = blocks_in(columns, wide), packed = (blocks_in(rows, high) * across + 7) / 8;
  std::vector<uint8_t> held(blocks, blocks + packed);
  held.resize(static_cast<size_t>(packed + kPatternPad));
  const int64_t each = 8 * std::max<int64_t>(1, kParallel / 8 / columns);  // rows that fill whole bytes
  const int64_t count = blocks_in(rows, each);
#pragma omp parallel for schedule(static) if (rows * columns > kParallel)
  for (int64_t c = 0; c < count; ++c) {
    const int64_t first = c * each, last = std::min(rows, first + each);
    BitSpan::clear_ends(bits, first * columns, (last - first) * columns);
    BitSpan span(bits, first * columns, (last - first) * columns);
    std::vector<uint8_t> line(static_cast<size_t>((columns + 7) / 8 + kPatternPad));
    for (int64_t row = first; row < last; ++row) {
      if (row == first || row % high == 0) {
        std::fill(line.begin(), line.end(), uint8_t{0});
        const int64_t from = row / high * across;
        if (wide == 1) {
          copy_bits(line.data(), 0, held.data(), from, across);
        } else {
          for (int64_t b = 0; b < across; ++b) {
            if (((held[static_cast<size_t>((from + b) >> 3)] >> ((from + b) & 7)) & 1) == 0) continue;
            set_ones(line.data(), b * wide, std::min(wide, columns - b * wide));
          }
        }
      }
      copy_bits(span.buffer(), span.at(row * columns), line.data(), 0, columns);
    }
    span.store();
  }
}

}  // namespace paikern

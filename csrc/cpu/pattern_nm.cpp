// N:M masks: of every m consecutive scores along an axis the bits of the n largest.
//
//   keep[o, i, s] = |{j in the group of i : score[o, j, s] before score[o, i, s]}| < n,  before: larger, or equal at j
//   < i
//
// Bytes moved: one read of the scores and one bit written per score, which is the limit; nothing of their size is made.
// A slab is m neighbours along the axis times everything inside it, so its bits are one run of the mask. Slabs are
// ranked on their own, a tile at a time, and the result depends neither on threads nor on how they are cut.
#include <algorithm>
#include <functional>
#include <limits>

#include "pattern_keys.h"
#include "pattern_load.h"
#include "subnormals.h"

namespace paikern {
namespace {

constexpr int64_t kChunk = 1 << 16;     // scores of one unit of work, more if a slab is larger
constexpr int64_t kLine = 64;           // bytes of a line of memory
constexpr int64_t kParallel = 1 << 16;  // below this a thread costs more than it brings

struct Groups {
  int64_t n, m;

  int64_t keep(int64_t width) const { return width == m ? n : (width * n + m - 1) / m; }
};

// Slabs of a tensor, the narrower ones at the end of the axis included.
class Slabs {
 public:
  Slabs(const NmSource &source, const Groups &groups)
      : axis_(source.axis), inner_(source.inner), m_(groups.m), each_((axis_ + m_ - 1) / m_) {
    const int64_t numel = source.scores.numel();
    count = numel == 0 ? 0 : numel / (axis_ * inner_) * each_;
  }

  int64_t position(int64_t slab) const { return (slab / each_ * axis_ + slab % each_ * m_) * inner_; }
  int64_t width(int64_t slab) const { return std::min(m_, axis_ - slab % each_ * m_); }

  // How many of the slabs first .. last follow each other with one width.
  int64_t alike(int64_t first, int64_t last) const {
    if (axis_ % m_ == 0) return last - first;
    const int64_t whole = axis_ / m_ - first % each_;
    return std::clamp<int64_t>(whole, 1, last - first);
  }

  // Whether a tensor is ranked by whole rows, several at a time, because its columns lie side by side.
  bool crosswise(const ScoreReader &reader) const {
    return inner_ == 1 && axis_ % m_ == 0 && m_ <= kPatternNarrow && reader.crosswise(axis_);
  }

  int64_t count;

 private:
  int64_t axis_, inner_, m_, each_;
};

struct Chunk {
  int64_t source, first, last;  // slabs
};

class Worker {
 public:
  Worker(const NmSource &source, const Groups &groups) : s_(source), groups_(groups), slabs_(source, groups) {}

  // Writes the bits of the slabs first .. last; returns whether a score is NaN.
  bool run(int64_t first, int64_t last) {
    const int64_t start = slabs_.position(first);
    BitSpan span(s_.bits, start, slabs_.position(last - 1) + slabs_.width(last - 1) * s_.inner - start);
    if (slabs_.crosswise(reader_)) {
      if (across(start / s_.axis, (last - first) * groups_.m / s_.axis, &span)) return true;
      span.store();
      return false;
    }
    for (int64_t slab = first; slab < last;) {
      const int64_t alike = slabs_.alike(slab, last), width = slabs_.width(slab);
      for (int64_t done = 0; done < alike;) {
        const int64_t some = std::clamp<int64_t>(kPatternTile / (width * s_.inner), 1, alike - done);
        if (rows(slabs_.position(slab + done), some, width, &span)) return true;
        done += some;
      }
      slab += alike;
    }
    span.store();
    return false;
  }

 private:
  // Slabs that fit into a tile, or one slab, which is cut along its inside until its parts do.
  bool rows(int64_t start, int64_t slabs, int64_t width, BitSpan *span) {
    const int64_t most = std::max<int64_t>(1, kPatternTile / width / slabs);
    for (int64_t s = 0; s < s_.inner; s += most) {
      const int64_t run = std::min(most, s_.inner - s);
      NmTile tile{nullptr,
                  slabs,
                  width,
                  run,
                  s_.inner,
                  groups_.keep(width),
                  s_.scores.absolute,
                  s_.scores.type == PatternType::kFloat16,
                  span->buffer(),
                  span->at(start + s),
                  s_.inner};
      tile.raw = raw(start + s, &tile);
      if (width <= kPatternNarrow ? narrow(tile) : wide(tile)) return true;
    }
    return false;
  }

  // Whole rows of a matrix whose columns lie side by side: a line of memory holds one score of many rows, so a tile
  // takes as many rows as a line has scores (W.T of 4096 x 8192 fp32: 350 ms row by row, 67 so).
  bool across(int64_t first, int64_t rows, BitSpan *span) {
    const int64_t high = kLine / reader_.itemsize(), wide = kPatternTile / high / groups_.m * groups_.m;
    uint8_t bits[kPatternTile / 8 + kPatternPad];
    for (int64_t row = first; row < first + rows; row += high) {
      const int64_t tall = std::min(high, first + rows - row);
      for (int64_t column = 0; column < s_.axis; column += wide) {
        const int64_t across = std::min(wide, s_.axis - column);
        std::fill_n(bits, sizeof(bits), uint8_t{0});
        reader_.read_across(row, tall, column, across, small_);
        const NmTile tile{small_,
                          tall * across / groups_.m,
                          groups_.m,
                          1,
                          1,
                          groups_.n,
                          s_.scores.absolute,
                          s_.scores.type == PatternType::kFloat16,
                          bits,
                          0,
                          1};
        if (narrow(tile)) return true;
        for (int64_t i = 0; i < tall; ++i) {
          copy_bits(span->buffer(), span->at((row + i) * s_.axis + column), bits, i * across, across);
        }
      }
    }
    return false;
  }

  // The scores of a tile, in place if they can be read there.
  const void *raw(int64_t start, NmTile *tile) {
    const int64_t lines = tile->slabs * tile->width;
    if (reader_.direct() || tile->run == s_.inner) {
      return reader_.read(start, lines * tile->run, buffer(lines * tile->run));
    }
    auto *to = static_cast<uint8_t *>(buffer(lines * tile->run));
    const int64_t line = tile->run * reader_.itemsize();
    for (int64_t j = 0; j < lines; ++j) {
      const void *from = reader_.read(start + j * s_.inner, tile->run, to + j * line);
      if (from != to + j * line) std::copy_n(static_cast<const uint8_t *>(from), line, to + j * line);
    }
    tile->row = tile->run;
    return to;
  }

  void *buffer(int64_t count) {
    if (count <= kPatternTile) return small_;
    large_.resize(static_cast<size_t>(count));
    return large_.data();
  }

  bool narrow(const NmTile &tile) const {
    switch (reader_.type()) {
      case PatternType::kFloat32:
        return inner_.nm32(tile);
      case PatternType::kFloat64:
        return inner_.nm64(tile);
      default:
        return inner_.nm16(tile);
    }
  }

  bool wide(const NmTile &tile) const {
    switch (reader_.type()) {
      case PatternType::kFloat32:
        return select<int32_t>(tile);
      case PatternType::kFloat64:
        return select<int64_t>(tile);
      default:
        return select<int16_t>(tile);
    }
  }

  // Groups too wide for comparing all pairs, one after the other.
  template <class Key>
  static bool select(const NmTile &t) {
    using Raw = typename PatternKeys<Key>::Raw;
    const PatternKeys<Key> order(t.absolute, t.ieee);
    std::vector<Key> keys(static_cast<size_t>(t.width)), sorted;
    for (int64_t group = 0; group < t.slabs * t.run; ++group) {
      const int64_t row = group / t.run * t.width, s = group % t.run;
      const Raw *from = static_cast<const Raw *>(t.raw) + row * t.row + s;
      for (int64_t j = 0; j < t.width; ++j) {
        if (order.nan(from[j * t.row])) return true;
        keys[static_cast<size_t>(j)] = order.key(from[j * t.row]);
      }
      sorted = keys;
      const auto last = sorted.begin() + (t.keep - 1);
      std::nth_element(sorted.begin(), last, sorted.end(), std::greater<Key>());
      int64_t ties = 1 + std::count(sorted.begin(), last, *last);
      for (int64_t j = 0; j < t.width; ++j) {
        const Key key = keys[static_cast<size_t>(j)];
        if (key < *last || (key == *last && ties-- <= 0)) continue;
        const int64_t bit = t.at + (row + j) * t.bit_row + s;
        t.bits[bit >> 3] = static_cast<uint8_t>(t.bits[bit >> 3] | (1u << (bit & 7)));
      }
    }
    return false;
  }

  const NmSource &s_;
  const Groups groups_;
  const Slabs slabs_;
  const ScoreReader reader_{s_.scores};
  const PatternInner &inner_ = pattern_inner();
  alignas(64) double small_[kPatternTile];
  std::vector<double> large_;
};

}  // namespace

int64_t nm_mask(const std::vector<NmSource> &sources, int64_t n, int64_t m) {
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  const Groups groups{n, m};
  std::vector<Chunk> chunks;
  int64_t total = 0;
  for (size_t index = 0; index < sources.size(); ++index) {
    const NmSource &source = sources[index];
    const Slabs slabs(source, groups);
    // Of eight slabs each, if there is room, so that they begin with a byte where the axis has no odd end.
    int64_t each = kChunk / std::max<int64_t>(1, std::min(m, source.axis) * source.inner);
    each = each >= 8 ? each & ~int64_t{7} : std::max<int64_t>(1, each);
    if (slabs.crosswise(ScoreReader(source.scores))) {
      const int64_t row = source.axis / m, rows = std::max<int64_t>(1, each / row / kLine);
      each = rows * kLine * row;  // whole lines of every type
    }
    for (int64_t first = 0; first < slabs.count; first += each) {
      const int64_t last = std::min(slabs.count, first + each), start = slabs.position(first);
      chunks.push_back({static_cast<int64_t>(index), first, last});
      BitSpan::clear_ends(source.bits, start, slabs.position(last - 1) + slabs.width(last - 1) * source.inner - start);
    }
    total += source.scores.numel();
  }
  const int64_t count = static_cast<int64_t>(chunks.size());
  int64_t nan = kNone;
#pragma omp parallel for schedule(static) if (total > kParallel) reduction(min : nan)
  for (int64_t c = 0; c < count; ++c) {
    const SubnormalsCount guard;
    const Chunk &chunk = chunks[static_cast<size_t>(c)];
    Worker worker(sources[static_cast<size_t>(chunk.source)], groups);
    if (worker.run(chunk.first, chunk.last)) nan = std::min(nan, chunk.source);
  }
  return nan == kNone ? -1 : nan;
}

}  // namespace paikern

// Bodies of PatternInner; included by pattern_portable.cpp, pattern_avx2.cpp and pattern_avx512.cpp, whose compiler
// options make vectors of their instruction set out of the loops and of the vector type below.
//
// A tile of groups becomes `width` planes of keys, plane j holding the j-th key of every group. A key is kept if fewer
// than `keep` others of its group rank before it, which is width * (width - 1) comparisons of whole vectors and needs
// neither branches nor a sort. Each group ends as one word of `width` bits.
#include <cmath>
#include <cstring>

#include "pattern_inner.h"
#include "pattern_keys.h"
#include "score_loops.inc.h"

namespace {

using paikern::copy_bits;
using paikern::kPatternPad;
using paikern::kPatternTile;
using paikern::NmTile;
using paikern::PatternKeys;

constexpr int64_t kVector = 64;                             // bytes; narrower machines take it apart
constexpr int64_t kStep = 64;                               // planes are padded to this many keys
constexpr int64_t kPlanes = kPatternTile + 16 * 2 * kStep;  // keys of all planes, each padded twice

template <class Key>
struct Planes {
  alignas(kVector) Key keys[kPlanes];
  alignas(kVector) Key words[kPatternTile + 2 * kStep];  // bit j: the j-th of the group is kept
  alignas(kVector) Key flat[kPatternTile + kStep];       // keys before they are parted
  int64_t pitch;                                         // from plane to plane
};

// Every kWidth-th value to a plane of its own, which compilers make shuffles of.
template <class Key, int kWidth, class From, class Take>
void deal(const From *from, int64_t slabs, Key *to, int64_t pitch, Take take) {
#pragma GCC ivdep
  for (int64_t q = 0; q < slabs; ++q) {
    for (int j = 0; j < kWidth; ++j) to[j * pitch + q] = take(from[q * kWidth + j]);
  }
}

// Groups of neighbours (run = 1) of a width that shuffles can part.
template <class Key, int kWidth>
bool split(const NmTile &t, Planes<Key> *p) {
  using Raw = typename PatternKeys<Key>::Raw;
  constexpr int64_t kPitch = kPatternTile / kWidth + kStep;
  const PatternKeys<Key> order(t.absolute, t.ieee);
  const Raw *raw = static_cast<const Raw *>(t.raw);
  p->pitch = kPitch;
  Key top = 0;
  const auto key = [&](Raw word) {
    top = std::max(top, order.magnitude(word));
    return order.key(word);
  };
  if constexpr (kWidth <= 8) {
    deal<Key, kWidth>(raw, t.slabs, p->keys, kPitch, key);
  } else {  // in two steps: a loop over 16 planes is taken apart into single values
    constexpr int kHalf = 4, kRest = kWidth / kHalf;
    constexpr int64_t kBetween = kPatternTile / kHalf + kStep / kHalf;
    deal<Key, kHalf>(raw, t.slabs * kRest, p->flat, kBetween, key);
    for (int j = 0; j < kHalf; ++j) {
      deal<Key, kRest>(p->flat + j * kBetween, t.slabs, p->keys + j * kPitch, kHalf * kPitch, [](Key k) { return k; });
    }
  }
  return order.nan(top);
}

template <class Key>
bool split_any(const NmTile &t, Planes<Key> *p) {
  using Raw = typename PatternKeys<Key>::Raw;
  const PatternKeys<Key> order(t.absolute, t.ieee);
  const Raw *raw = static_cast<const Raw *>(t.raw);
  p->pitch = (t.slabs * t.run + 2 * kStep - 1) / kStep * kStep;
  Key top = 0;
  if (t.run == 1) {
    for (int64_t j = 0; j < t.width; ++j) {
      Key *plane = p->keys + j * p->pitch;
      for (int64_t q = 0; q < t.slabs; ++q) {
        const Raw word = raw[q * t.row * t.width + j * t.row];
        top = std::max(top, order.magnitude(word));
        plane[q] = order.key(word);
      }
    }
    return order.nan(top);
  }
  if (t.run < 64 && t.row == t.run) {
    // Short rows: all keys in one loop, then copies of one size each, whose excess the next one overwrites.
    constexpr int64_t kCopy = 16;
    const int64_t count = t.slabs * t.width * t.run;
    Key *flat = p->flat;
    for (int64_t i = 0; i < count; ++i) {
      top = std::max(top, order.magnitude(raw[i]));
      flat[i] = order.key(raw[i]);
    }
    for (int64_t j = 0; j < t.width; ++j) {
      for (int64_t q = 0; q < t.slabs; ++q) {
        const Key *from = flat + (q * t.width + j) * t.run;
        Key *to = p->keys + j * p->pitch + q * t.run;
        for (int64_t s = 0; s < t.run; s += kCopy) std::memcpy(to + s, from + s, kCopy * sizeof(Key));
      }
    }
    return order.nan(top);
  }
  for (int64_t q = 0; q < t.slabs; ++q) {
    for (int64_t j = 0; j < t.width; ++j) {
      const Raw *from = raw + (q * t.width + j) * t.row;
      Key *to = p->keys + j * p->pitch + q * t.run;
      for (int64_t s = 0; s < t.run; ++s) {
        top = std::max(top, order.magnitude(from[s]));
        to[s] = order.key(from[s]);
      }
    }
  }
  return order.nan(top);
}

template <class Key>
struct VectorOf {
  typedef Key type __attribute__((vector_size(kVector), may_alias));
};

// Where the tile after this one lies, if it lies in memory.
template <class Key>
class Ahead {
 public:
  explicit Ahead(const NmTile &t)
      : base_(static_cast<const Key *>(t.raw)), cut_(t.slabs == 1 && t.run < t.row), row_(t.row), width_(t.width) {
    base_ += cut_ ? t.run : t.slabs * t.width * t.row;
  }

  // One line: as many as were read for the vector of groups that begins at `at`.
  void fetch(int64_t j, int64_t at) const {
    constexpr int64_t kLanes = kVector / static_cast<int64_t>(sizeof(Key));
    __builtin_prefetch(base_ + (cut_ ? j * row_ + at : at * width_ + j * kLanes), 0, 2);
  }

 private:
  const Key *base_;
  bool cut_;
  int64_t row_, width_;
};

// The kept of every group as bits of a word. While one tile is compared the next one is fetched: alone, this loop
// leaves memory idle and the reads leave the arithmetic idle (8192 x 4096 fp32, 2:4: 19 ms without, 12 with).
template <class Key, int kWidth>
void compare(const NmTile &t, Planes<Key> *p) {
  using V = typename VectorOf<Key>::type;
  constexpr int64_t kLanes = kVector / static_cast<int64_t>(sizeof(Key));
  const int64_t groups = t.slabs * t.run;
  const V keep = V{} + static_cast<Key>(t.keep);
  const Ahead<Key> ahead(t);
  for (int64_t at = 0; at < groups; at += kLanes) {
    const auto plane = [&](int64_t j) -> const V & {
      return *reinterpret_cast<const V *>(p->keys + j * p->pitch + at);
    };
    V word = {};
    if constexpr (kWidth != 0) {
      // before[i]: minus how many rank before it. Of equal keys the first does, so that i < j is beaten or beats.
      V before[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) before[i] = V{} - static_cast<Key>(i);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        const V mine = plane(i);
        ahead.fetch(i, at);
#pragma GCC unroll 16
        for (int j = i + 1; j < kWidth; ++j) {
          const V beaten = static_cast<V>(plane(j) > mine);
          before[i] += beaten;
          before[j] -= beaten;
        }
        const Key bit = static_cast<Key>(Key{1} << i);
        word |= static_cast<V>(before[i] + keep > 0) & bit;
      }
    } else {
      for (int64_t i = 0; i < t.width; ++i) {
        const V mine = plane(i);
        V before = {};
        ahead.fetch(i, at);
        for (int64_t j = 0; j < i; ++j) before += static_cast<V>(plane(j) >= mine);
        for (int64_t j = i + 1; j < t.width; ++j) before += static_cast<V>(plane(j) > mine);
        const Key bit = static_cast<Key>(Key{1} << i);
        word |= static_cast<V>(before + keep > 0) & bit;
      }
    }
    *reinterpret_cast<V *>(p->words + at) = word;
  }
}

// Words of neighbours, one after the other.
template <class Key>
void emit_words(const NmTile &t, const Planes<Key> &p) {
  alignas(8) uint8_t bytes[kPatternTile + 2 * kStep], packed[kPatternTile / 8 + kPatternPad];
  const Key *words = p.words;
  const int64_t count = t.slabs * t.width;
  switch (t.width) {
    case 2:
    case 4:
      for (int64_t q = 0; q < (t.slabs + 7) / 8 * 8; ++q) bytes[q] = static_cast<uint8_t>(words[q]);
      if (t.width == 4) {
        for (int64_t i = 0; i < (count + 7) / 8; ++i) {
          packed[i] = static_cast<uint8_t>(bytes[2 * i] | (bytes[2 * i + 1] << 4));
        }
      } else {
        for (int64_t i = 0; i < (count + 7) / 8; ++i) {
          packed[i] = static_cast<uint8_t>(bytes[4 * i] | (bytes[4 * i + 1] << 2) | (bytes[4 * i + 2] << 4) |
                                           (bytes[4 * i + 3] << 6));
        }
      }
      break;
    case 8:
      for (int64_t q = 0; q < t.slabs; ++q) packed[q] = static_cast<uint8_t>(words[q]);
      break;
    default: {
      uint64_t held = 0;
      int64_t filled = 0, byte = 0;
      const uint64_t low = (uint64_t{1} << t.width) - 1;
      for (int64_t q = 0; q < t.slabs; ++q) {
        held |= (static_cast<uint64_t>(words[q]) & low) << filled;
        filled += t.width;
        if (filled >= 32) {
          std::memcpy(packed + byte, &held, 4);
          held >>= 32, filled -= 32, byte += 4;
        }
      }
      std::memcpy(packed + byte, &held, 8);
    }
  }
  copy_bits(t.bits, t.at, packed, 0, count);
}

// Bit j of the words in runs, each part of a row of the tensor.
template <class Key>
void emit_planes(const NmTile &t, const Planes<Key> &p) {
  alignas(8) uint8_t bytes[kPatternTile + kStep], packed[kPlanes / 8 + 16 * kPatternPad], joined[kPatternTile / 8 + 16];
  const int64_t groups = t.slabs * t.run, whole = (groups + 7) / 8, pitch = whole + 8;
  for (int64_t j = 0; j < t.width; ++j) {
    for (int64_t i = 0; i < 8 * whole; ++i) bytes[i] = static_cast<uint8_t>((p.words[i] >> j) & 1);
    for (int64_t b = 0; b < whole; ++b) {
      uint64_t eight;
      std::memcpy(&eight, bytes + 8 * b, 8);
      packed[j * pitch + b] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);  // the lowest bit of each byte
    }
  }
  if (t.run > 56 || t.bit_row != t.run) {
    for (int64_t row = 0; row < t.slabs * t.width; ++row) {
      copy_bits(t.bits, t.at + row * t.bit_row, packed + row % t.width * pitch, row / t.width * t.run, t.run);
    }
    return;
  }
  // Short rows follow each other: they are joined in a register, as no store can be read back in time.
  uint64_t held = 0, low = (uint64_t{1} << t.run) - 1;
  int64_t filled = 0, byte = 0;
  for (int64_t q = 0; q < t.slabs; ++q) {
    const int64_t from = q * t.run;
    for (int64_t j = 0; j < t.width; ++j) {
      uint64_t word;
      std::memcpy(&word, packed + j * pitch + (from >> 3), 8);
      held |= ((word >> (from & 7)) & low) << filled;
      filled += t.run;
      std::memcpy(joined + byte, &held, 8);
      byte += filled >> 3;
      held >>= filled & 56;
      filled &= 7;
    }
  }
  copy_bits(t.bits, t.at, joined, 0, groups * t.width);
}

template <class Key>
bool nm_tile(const NmTile &t) {
  Planes<Key> planes;
  bool nan;
  const bool neighbours = t.run == 1 && t.row == 1 && t.bit_row == 1;
  switch (neighbours ? t.width : 0) {
    case 2:
      nan = split<Key, 2>(t, &planes);
      break;
    case 4:
      nan = split<Key, 4>(t, &planes);
      break;
    case 8:
      nan = split<Key, 8>(t, &planes);
      break;
    case 16:
      nan = split<Key, 16>(t, &planes);
      break;
    default:
      nan = split_any<Key>(t, &planes);
  }
  if (nan) return true;
  switch (t.width) {
    case 2:
      compare<Key, 2>(t, &planes);
      break;
    case 4:
      compare<Key, 4>(t, &planes);
      break;
    case 8:
      compare<Key, 8>(t, &planes);
      break;
    default:
      compare<Key, 0>(t, &planes);
  }
  if (neighbours) {
    emit_words(t, planes);
  } else {
    emit_planes(t, planes);
  }
  return false;
}

template <class Value>
Value taken(Value value, bool absolute) {
  return absolute ? static_cast<Value>(__builtin_fabs(value)) : value;
}

template <class Value>
void add(const Value *values, int64_t count, bool absolute, double *sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += static_cast<double>(taken(values[i], absolute));
}

typedef double Eight __attribute__((vector_size(64)));

// sum += eight values, or their magnitudes.
template <class Value>
void add_eight(const Value *from, bool absolute, Eight *sum) {
  typedef std::conditional_t<sizeof(Value) == 4, uint32_t, uint64_t> Word;
  typedef Word Words __attribute__((vector_size(8 * sizeof(Value))));
  typedef Value Values __attribute__((vector_size(8 * sizeof(Value))));
  const Word all = static_cast<Word>(~Word{0}), clear = absolute ? all >> 1 : all;
  Words words;
  std::memcpy(&words, from, sizeof(words));
  words &= clear;
  *sum += __builtin_convertvector(reinterpret_cast<Values>(words), Eight);
}

template <class Value>
void add_blocks(const Value *values, int64_t count, int64_t wide, bool absolute, double *sums) {
  for (int64_t start = 0; start < count; start += wide, sums += 8) {
    const Value *from = values + start;
    Eight sum;
    std::memcpy(&sum, sums, sizeof(sum));
    int64_t i = 0;
    for (; i + 8 <= wide; i += 8) add_eight(from + i, absolute, &sum);
    std::memcpy(sums, &sum, sizeof(sum));
    for (int64_t lane = 0; i < wide; ++i, ++lane) sums[lane] += static_cast<double>(taken(from[i], absolute));
  }
}

#define PAIKERN_PATTERN_INNER                                                                 \
  {nm_tile<int16_t>, nm_tile<int32_t>, nm_tile<int64_t>,  widen_halves,      factored_scores, \
   add<float>,       add<double>,      add_blocks<float>, add_blocks<double>}

}  // namespace

// Where to look for the threshold: a band of scores that holds the k-th with near certainty, and what it means for the
// scores of each tensor.
//
// Scores have a global order key: the score itself or, where tensors carry exponents, an exact number that has the
// exponent folded in. It rises with the score within a tensor, so that bounds on keys are bounds on scores.
#pragma once

#include <cmath>
#include <functional>
#include <memory>

#include "paikern/keys.h"
#include "topk_chunks.h"

namespace paikern {

template <class Value, bool Scaled>
struct TopkKeys {
  using Key = Value;
  static Key key(Value value, int64_t) { return value; }
};

// Ranks of scaled floats stay below 2**53 or are 2**62, so double holds them exactly.
template <>
struct TopkKeys<float, true> {
  using Key = double;
  static Key key(float value, int64_t shift) { return static_cast<double>(scaled_rank(value, shift)); }
};

template <>
struct TopkKeys<double, true> {
  using Key = __int128;
  static Key key(double value, int64_t shift) { return scaled_rank(value, shift); }
};

template <class Key>
struct TopkGuess {
  Key low, high;             // the k-th key is believed to lie in [low, high]
  bool open_low, open_high;  // there was no such bound: everything below (above) belongs to the band
  bool tied_low, tied_high;  // many scores are equal to the bound: they are counted, not collected
  bool keep_high;            // those equal to `high` get their bit at once
};

// Memory that is not filled before it is used, and kept only while it is small.
template <class Item>
class TopkBuffer {
 public:
  static constexpr int64_t kSlack = 64, kHeld = 1 << 18;  // the loops write whole vectors behind the last item

  Item *reserve(int64_t items) {
    if (items > room_) {
      items_ = std::make_unique_for_overwrite<Item[]>(static_cast<size_t>(items + kSlack));
      room_ = items;
    }
    return items_.get();
  }
  Item *get() const { return items_.get(); }
  void shrink() {
    if (room_ > kHeld) *this = TopkBuffer();
  }

 private:
  std::unique_ptr<Item[]> items_;
  int64_t room_ = 0;
};

// The rank-th largest key, and how many are greater.
template <class Key>
Key nth_key(const Key *keys, int64_t count, int64_t rank, TopkBuffer<Key> *buffer, int64_t *greater) {
  Key *work = buffer->reserve(count);
  if constexpr (std::is_floating_point_v<Key>) {
    return topk_loops<Key>(topk_inner()).nth(keys, count, rank, work, greater);
  } else {
    std::copy_n(keys, count, work);
    std::nth_element(work, work + (rank - 1), work + count, std::greater<Key>());
    const Key found = work[rank - 1];
    *greater = std::count_if(work, work + rank, [&](Key key) { return key > found; });
    return found;
  }
}

// Runs of neighbours, one of each stretch of the whole. Where in the stretch is hashed, because a fixed place would
// meet the same columns of every row, or the same side of a pattern in the mask.
struct TopkSample {
  static constexpr int64_t kRun = 32;  // two cache lines: they come together, and cost what one float does
  static constexpr int64_t kMost = 1 << 19;

  // Sampling costs about S, and what lies in the band about 11 N / sqrt(S): the best S goes with N**(2/3).
  // `cheap`: scores are only read.
  explicit TopkSample(int64_t total, bool cheap = true) {
    const double n = static_cast<double>(total);
    const auto best = static_cast<int64_t>((total < (1 << 19) ? 1.5 : 3.0) * std::cbrt(n * n));
    const int64_t runs = std::max<int64_t>(1, std::min({cheap ? best : best / 8, kMost, total / 2}) / kRun);
    stride = std::max<int64_t>(1, total / runs);
  }

  int64_t position(int64_t stretch) const {
    const uint64_t hash = (static_cast<uint64_t>(stretch) * 0x9e3779b97f4a7c15u) >> 32;
    const auto within =
        static_cast<int64_t>((static_cast<unsigned __int128>(hash) * static_cast<uint64_t>(stride)) >> 32);
    return stretch * stride + within;
  }

  int64_t stride;
};

// Returns how many, or -1 if NaN was met.
template <class Value, bool Scaled, class Key>
int64_t sample_keys(const TopkChunks &chunks, TopkBuffer<Key> *keys) {
  const TopkSample sample(chunks.total(), !chunks.computed());
  const TopkInner &inner = topk_inner();
  Key *const first = keys->reserve((chunks.total() / sample.stride + 1) * TopkSample::kRun), *out = first;
  bool nan = false;
  struct Run {
    const Chunk *chunk;
    int64_t start;
  };
  constexpr int kTogether = 32;  // runs fetched at once, while one waits for memory
  Run runs[kTogether];
  const int64_t total = chunks.total();
  const Chunk *chunk = &chunks[0];
  for (int64_t stretch = 0; stretch * sample.stride < total;) {
    int ready = 0;
    for (; ready < kTogether && stretch * sample.stride < total; ++stretch) {
      const int64_t at = sample.position(stretch);
      if (at >= total) continue;
      while (at >= chunk->global + chunk->count) ++chunk;
      const int64_t start = chunk->start + (at - chunk->global) / TopkSample::kRun * TopkSample::kRun;
      if (in_place<Value>(*chunk->source)) {
        const Value *from = static_cast<const Value *>(chunk->source->data) + start;
        __builtin_prefetch(from);
        __builtin_prefetch(from + TopkSample::kRun - 1);
      }
      runs[ready++] = {chunk, start};
    }
    for (int r = 0; r < ready; ++r) {
      const ScoreSource &s = *runs[r].chunk->source;
      const int64_t count = std::min(TopkSample::kRun, s.numel - runs[r].start);
      Value buffer[kTile];
      const Value *values = buffer;
      if (in_place<Value>(s)) {
        values = static_cast<const Value *>(s.data) + runs[r].start;
      } else if (s.tiles != nullptr) {
        float scores[TopkSample::kRun];
        s.tiles->sample(runs[r].start, count, scores);
        std::copy_n(scores, count, buffer);
      } else {
        values = load(inner, s, runs[r].start, count, buffer);
      }
      const bool absolute = absolute_later(s);
      const Value *last = values + count;
      nan |= std::count_if(values, last, [](Value v) { return v != v; }) != 0;
      if constexpr (!Scaled) {
        if (!absolute) {
          out = std::copy(values, last, out);
          continue;
        }
      }
      for (const Value *value = values; value != last; ++value) {
        *out++ = TopkKeys<Value, Scaled>::key(absolute ? std::fabs(*value) : *value, runs[r].chunk->shift);
      }
    }
  }
  return nan ? -1 : out - first;
}

// A guess from a sample, for rank k of `total`.
template <class Key>
TopkGuess<Key> guess_from(const Key *keys, int64_t size, int64_t k, int64_t total, TopkBuffer<Key> *work) {
  const double s = static_cast<double>(size), q = static_cast<double>(k) / static_cast<double>(total);
  // Small rankings take the greater risk (1.2 %) of having to look twice.
  const double sigmas = total < (1 << 19) ? 2.5 : 5.0;
  const double spread = sigmas * std::sqrt(s * q * (1.0 - q)) + 2.0;
  const double from = std::floor(s * q - spread), to = std::ceil(s * q + spread);
  TopkGuess<Key> guess{};
  guess.open_high = from < 1;
  guess.open_low = to > s;
  int64_t greater = 0;
  const auto sampled_equal = [&](Key key) -> int64_t {
    if constexpr (std::is_floating_point_v<Key>) {
      return topk_loops<Key>(topk_inner()).equal(keys, size, key);
    } else {
      return std::count(keys, keys + size, key);
    }
  };
  const int64_t many = 4 + size / 200;
  if (!guess.open_high) {
    guess.high = nth_key(keys, size, static_cast<int64_t>(from), work, &greater);
    const int64_t equal = sampled_equal(guess.high);
    guess.tied_high = equal > many;
    // The share of the tied that will be kept, as the sample has it.
    guess.keep_high = guess.tied_high && 2.0 * (s * q - static_cast<double>(greater)) > static_cast<double>(equal);
  }
  if (!guess.open_low) {
    guess.low = nth_key(keys, size, static_cast<int64_t>(to), work, &greater);
    guess.tied_low = sampled_equal(guess.low) > many;
  }
  return guess;
}

// The guess in terms of the scores of one tensor.
template <class Value, bool Scaled, class Key>
TopkBand<Value> band_of(const TopkGuess<Key> &guess, int64_t shift) {
  using Bits = std::conditional_t<std::is_same_v<Value, float>, uint32_t, uint64_t>;
  constexpr Value kInfinity = std::numeric_limits<Value>::infinity(), kNone = std::numeric_limits<Value>::quiet_NaN();
  // The first score whose key is at least (or above) a bound; NaN if there is none.
  const auto first = [&](Key bound, bool beyond) -> Value {
    if constexpr (!Scaled) {
      (void)shift;
      if (!beyond) return bound;
      return bound == kInfinity ? kNone : value_of(static_cast<Bits>(ordered_key(bound) + 1));
    } else {
      Bits left = ordered_key(-kInfinity), right = ordered_key(kInfinity) + 1;
      const Bits end = right;
      while (left < right) {
        const Bits middle = left + (right - left) / 2;
        const Key key = TopkKeys<Value, Scaled>::key(value_of(middle), shift);
        if (key > bound || (key == bound && !beyond)) {
          right = middle;
        } else {
          left = middle + 1;
        }
      }
      return left == end ? kNone : value_of(left);
    }
  };
  const auto equal = [&](Key bound) {
    const Value value = first(bound, false);
    return value == value && TopkKeys<Value, Scaled>::key(value, shift) == bound ? value : kNone;
  };
  TopkBand<Value> band;
  band.ties = guess.tied_low || guess.tied_high;
  band.keep = guess.open_high ? kNone : first(guess.high, !guess.keep_high);
  band.end = guess.tied_high ? first(guess.high, false) : band.keep;
  band.low = guess.open_low ? -kInfinity : first(guess.low, guess.tied_low);
  // Nothing lies in the band: neither below infinity nor at least that.
  if (band.low != band.low || band.end <= band.low) band.low = band.end = kInfinity;
  band.tie_high = guess.tied_high ? equal(guess.high) : kNone;
  band.tie_low = guess.tied_low && !(guess.tied_high && guess.low == guess.high) ? equal(guess.low) : kNone;
  return band;
}

}  // namespace paikern

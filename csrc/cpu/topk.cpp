// Exact top-k masks over many tensors, without concatenating them and without a float mask.
//
//   keep[i] = rank(score[i]) < k,  rank by (score descending, position ascending)
//
// Bytes moved: one read of the scores and one bit written per score, against a limit of just that. Steps:
//   1. a strided sample gives a band of keys that holds the k-th key with near certainty (6 sigma);
//   2. one pass writes the bit "above the band", counts those, and collects what lies in the band;
//   3. the exact rank is found among the collected, ties to the lowest position, and their bits are set;
//   4. if the rank missed the band or too much lies in it (ties, quantised data), radix histograms narrow the band
//      to a single key, and a last pass counts ties per chunk before it writes them.
// Work is cut into fixed chunks, and chunks are joined in order, so the result does not depend on threads.
//
// Both checks of step 4 are mandatory: without them a skewed sample would give a wrong mask in silence.
#include "topk.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <type_traits>

#include "isa.h"
#include "paikern/keys.h"
#include "topk_inner.h"
#include "topk_load.h"
#include "topk_sample.h"

namespace paikern {
namespace {

constexpr int64_t kChunk = 1 << 16;     // scores of one unit of work, a multiple of 64
constexpr int64_t kDirect = 1 << 11;    // up to here everything is a candidate
constexpr int64_t kParallel = 1 << 16;  // below this a thread costs more than it brings
constexpr int kDigit = 11;              // radix of the histograms: 2048 counters stay in L1

struct Chunk {
  const ScoreSource *source;
  int64_t start, count;
  int64_t global;  // position of `start` over all sources
  int64_t source_index;
  int64_t shift;  // exponent of the source above the lowest of the ranking
};

template <class Key>
struct Candidate {
  Key key;
  int32_t at;  // position in its chunk
};

// Every score has a local key, its order within its tensor, and a global one with the exponent of its tensor folded in.
// Without exponents they are the same. The global key rises with the local one, so that a bound on global keys is a
// bound on the local keys of each chunk: the hot loops see 32-bit keys either way.
template <class Value, bool Scaled>
class Selector {
 public:
  using Local = std::conditional_t<std::is_same_v<Value, float>, uint32_t, uint64_t>;
  using ScaledKey = std::conditional_t<std::is_same_v<Value, float>, ScaledKey32, ScaledKey64>;
  using Key = std::conditional_t<Scaled, ScaledKey, Local>;

  Selector(const std::vector<ScoreSource> &sources, const Ranking &ranking, bool threads) : k_(ranking.k) {
    int64_t lowest = std::numeric_limits<int64_t>::max();
    for (int64_t l = ranking.first; l < ranking.last; ++l) {
      lowest = std::min(lowest, sources[static_cast<size_t>(l)].exponent);
    }
    for (int64_t l = ranking.first; l < ranking.last; ++l) {
      const ScoreSource &s = sources[static_cast<size_t>(l)];
      for (int64_t start = 0; start < s.numel; start += kChunk) {
        chunks_.push_back({&s, start, std::min(kChunk, s.numel - start), total_ + start, l, s.exponent - lowest});
      }
      total_ += s.numel;
    }
    threads_ = threads && total_ > kParallel;
  }

  // Writes the bits; returns the first source with NaN or -1.
  int64_t mask() {
    if (k_ <= 0 || k_ >= total_) return emit_constant(k_ > 0);
    const BandPass pass = band_pass();
    if (pass.nan >= 0) return pass.nan;
    if (pass.complete && pass.above <= k_ && k_ <= pass.above + pass.inside) {
      settle(pass.found, k_ - pass.above);
      return -1;
    }
    int64_t ties;
    const Key threshold = radix(&ties);
    emit_with_ties(threshold, ties);
    return -1;
  }

  // The k-th largest key, 1-based.
  Key kth(int64_t *nan) {
    const BandPass pass = band_pass();
    *nan = pass.nan;
    if (pass.nan >= 0) return 0;
    const int64_t need = k_ - pass.above;
    if (pass.complete && need > 0 && need <= pass.inside) {
      std::vector<Key> keys = keys_of(pass.found);
      std::nth_element(keys.begin(), keys.begin() + (need - 1), keys.end(), std::greater<Key>());
      return keys[static_cast<size_t>(need - 1)];
    }
    int64_t ties;
    return radix(&ties);
  }

 private:
  static Key global_key(Local local, int64_t shift) {
    if constexpr (Scaled) {
      return scaled_key(value_of(local), shift);
    } else {
      (void)shift;
      return local;
    }
  }

  // Local keys of a chunk, block by block: visit(keys, position in the chunk, count, whether one is NaN) -> go on?
  template <class Visit>
  void for_blocks(const Chunk &chunk, Visit visit) const {
    Value values[kBlock];
    Local keys[kBlock];
    const ScoreSource &s = *chunk.source;
    for (int64_t done = 0; done < chunk.count; done += kBlock) {
      const int64_t n = std::min(kBlock, chunk.count - done);
      const Value *from = load(inner_, s, chunk.start + done, n, values);
      bool nan = false;
      if constexpr (std::is_same_v<Value, float>) {
        nan = inner_.keys(from, n, s.absolute, keys);
      } else {
        for (int64_t i = 0; i < n; ++i) {
          nan |= from[i] != from[i];
          keys[i] = ordered_key(from[i]);
        }
      }
      if (!visit(keys, done, n, nan)) return;
    }
  }

  // A range of keys around rank k that holds it with near certainty, if the sample is like the whole.
  void sample_band(Key *low, Key *high) const {
    const TopkSample sample(total_);
    std::vector<Key> keys;
    keys.reserve(static_cast<size_t>(total_ / sample.stride + 1));
    auto chunk = chunks_.begin();
    for (int64_t stretch = 0; stretch * sample.stride < total_; ++stretch) {
      const int64_t at = sample.position(stretch);
      if (at >= total_) break;
      while (at >= chunk->global + chunk->count) ++chunk;
      const Value value = load_one<Value>(inner_, *chunk->source, chunk->start + at - chunk->global);
      keys.push_back(global_key(ordered_key(value), chunk->shift));
    }
    const double s = static_cast<double>(keys.size());
    const double q = static_cast<double>(k_) / static_cast<double>(total_);
    const double spread = 6.0 * std::sqrt(s * q * (1.0 - q)) + 2.0;
    const auto rank = [&](double r) -> int64_t {
      return std::clamp<int64_t>(static_cast<int64_t>(r), -1, static_cast<int64_t>(s));
    };
    const int64_t upper = rank(std::floor(s * q - spread)), lower = rank(std::ceil(s * q + spread));
    const auto sorted_at = [&](int64_t r) {
      std::nth_element(keys.begin(), keys.begin() + r, keys.end(), std::greater<Key>());
      return keys[static_cast<size_t>(r)];
    };
    if (upper >= 0) *high = sorted_at(upper);
    if (lower < static_cast<int64_t>(keys.size())) *low = sorted_at(lower);
  }

  struct Bounds {
    Local low, high;  // low <= local key <= high exactly where low <= global key <= high; may be empty
  };

  Bounds local_bounds(const Chunk &chunk, Key low, Key high) const {
    if constexpr (!Scaled) {
      (void)chunk;
      return {low, high};
    } else {
      // Keys of NaN lie outside and are refused anyway.
      const Local first = ordered_key(-std::numeric_limits<Value>::infinity());
      const Local last = ordered_key(std::numeric_limits<Value>::infinity());
      // The first local key whose global key is at least (or above) the bound; last + 1 if there is none.
      const auto search = [&](Key bound, bool beyond) {
        Local left = first, right = last + 1;
        while (left < right) {
          const Local middle = left + (right - left) / 2;
          const Key key = global_key(middle, chunk.shift);
          if (key > bound || (key == bound && !beyond)) {
            right = middle;
          } else {
            left = middle + 1;
          }
        }
        return left;
      };
      return {search(low, false), static_cast<Local>(search(high, true) - 1)};
    }
  }

  struct BandPass {
    std::vector<std::vector<Candidate<Key>>> found;  // those in the band, by chunk, in order of position
    int64_t above = 0, inside = 0;                   // how many lie above the band and in it
    int64_t nan = -1;                                // first source with NaN
    bool complete = true;                            // false: too many candidates, counts mean nothing
  };

  // One pass over all scores: bits of those above the band (if there is room for bits), keys of those in it.
  BandPass band_pass() const {
    Key low = 0, high = ~Key{0};
    const bool narrow = total_ > kDirect;
    if (narrow) sample_band(&low, &high);
    const int64_t count = static_cast<int64_t>(chunks_.size());
    // At most a sixteenth of the scores may be candidates, uneven chunks allowed for.
    const int64_t limit = narrow ? total_ / 16 / count * 4 + 64 : total_;
    BandPass pass;
    pass.found.resize(chunks_.size());
    int64_t above = 0, nan_source = kNone;
    bool complete = true;
#pragma omp parallel for schedule(static) if (threads_) reduction(min : nan_source) reduction(+ : above) \
    reduction(&& : complete)
    for (int64_t c = 0; c < count; ++c) {
      const Chunk &chunk = chunks_[static_cast<size_t>(c)];
      const Bounds bounds = local_bounds(chunk, low, high);
      auto &mine = pass.found[static_cast<size_t>(c)];
      for_blocks(chunk, [&](const Local *keys, int64_t done, int64_t n, bool nan) {
        if (nan) nan_source = std::min(nan_source, chunk.source_index);
        uint8_t unused[kBlock / 8], band[kBlock / 8];
        uint8_t *bits = chunk.source->bits;
        above += compare(keys, n, bounds, bits != nullptr ? bits + ((chunk.start + done) >> 3) : unused, band);
        for (int64_t b = 0; b < (n + 7) >> 3; ++b) {
          for (unsigned left = band[b]; left != 0; left &= left - 1) {
            const int64_t i = 8 * b + __builtin_ctz(left);
            mine.push_back({global_key(keys[i], chunk.shift), static_cast<int32_t>(done + i)});
          }
        }
        complete = complete && static_cast<int64_t>(mine.size()) <= limit;
        return complete;
      });
    }
    for (const auto &mine : pass.found) pass.inside += static_cast<int64_t>(mine.size());
    pass.above = above;
    pass.complete = complete;
    // A chunk with too many candidates was not read to its end, so NaN may hide there.
    pass.nan = complete ? (nan_source == kNone ? -1 : nan_source) : find_nan();
    return pass;
  }

  int64_t compare(const Local *keys, int64_t count, Bounds bounds, uint8_t *above, uint8_t *band) const {
    if constexpr (std::is_same_v<Local, uint32_t>) {
      return inner_.compare(keys, count, bounds.low, bounds.high, above, band);
    } else {
      int64_t total = 0;
      for (int64_t i = 0; i < count; i += 8) {
        unsigned over = 0, reached = 0;
        for (int64_t j = 0; j < std::min<int64_t>(8, count - i); ++j) {
          over |= static_cast<unsigned>(keys[i + j] > bounds.high) << j;
          reached |= static_cast<unsigned>(keys[i + j] >= bounds.low) << j;
        }
        above[i >> 3] = static_cast<uint8_t>(over);
        band[i >> 3] = static_cast<uint8_t>(reached & ~over);
        total += __builtin_popcount(over);
      }
      return total;
    }
  }

  int64_t find_nan() const {
    int64_t nan_source = kNone;
    const int64_t count = static_cast<int64_t>(chunks_.size());
#pragma omp parallel for schedule(static) if (threads_) reduction(min : nan_source)
    for (int64_t c = 0; c < count; ++c) {
      const Chunk &chunk = chunks_[static_cast<size_t>(c)];
      for_blocks(chunk, [&](const Local *, int64_t, int64_t, bool nan) {
        if (nan) nan_source = std::min(nan_source, chunk.source_index);
        return !nan;
      });
    }
    return nan_source == kNone ? -1 : nan_source;
  }

  static std::vector<Key> keys_of(const std::vector<std::vector<Candidate<Key>>> &found) {
    std::vector<Key> keys;
    for (const auto &part : found) {
      for (const auto &candidate : part) keys.push_back(candidate.key);
    }
    return keys;
  }

  // Set the bits of the best `need` candidates; those of one chunk are in order of position.
  void settle(const std::vector<std::vector<Candidate<Key>>> &found, int64_t need) const {
    if (need <= 0) return;
    std::vector<Key> keys = keys_of(found);
    std::nth_element(keys.begin(), keys.begin() + (need - 1), keys.end(), std::greater<Key>());
    const Key threshold = keys[static_cast<size_t>(need - 1)];
    int64_t ties = need - std::count_if(keys.begin(), keys.begin() + need, [&](Key key) { return key > threshold; });
    for (size_t c = 0; c < found.size(); ++c) {
      uint8_t *bits = chunks_[c].source->bits;
      for (const auto &candidate : found[c]) {
        if (candidate.key < threshold || (candidate.key == threshold && ties-- <= 0)) continue;
        const int64_t at = chunks_[c].start + candidate.at;
        bits[at >> 3] = static_cast<uint8_t>(bits[at >> 3] | (1u << (at & 7)));
      }
    }
  }

  // Most significant digit first: returns the k-th key, and how many keys equal to it are kept.
  Key radix(int64_t *ties) const {
    constexpr int kBits = static_cast<int>(sizeof(Key)) * 8;
    const int64_t count = static_cast<int64_t>(chunks_.size());
    Key prefix = 0;
    int64_t need = k_;
    for (int shift = kBits; shift > 0;) {
      const int next = std::max(0, shift - kDigit);
      const size_t last = (size_t{1} << (shift - next)) - 1;
      std::vector<int64_t> histogram(last + 1, 0);
#pragma omp parallel if (threads_)
      {
        std::vector<int64_t> mine(histogram.size(), 0);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < count; ++c) {
          const Chunk &chunk = chunks_[static_cast<size_t>(c)];
          for_blocks(chunk, [&](const Local *keys, int64_t, int64_t n, bool) {
            for (int64_t i = 0; i < n; ++i) {
              const Key key = global_key(keys[i], chunk.shift);
              if (shift == kBits || (key >> (shift % kBits)) == prefix) ++mine[static_cast<size_t>(key >> next) & last];
            }
            return true;
          });
        }
#pragma omp critical(paikern_topk_histogram)
        for (size_t b = 0; b <= last; ++b) histogram[b] += mine[b];
      }
      size_t bin = last;
      while (bin > 0 && histogram[bin] < need) need -= histogram[bin--];
      prefix = static_cast<Key>((shift == kBits ? Key{0} : static_cast<Key>(prefix << (shift - next))) | bin);
      shift = next;
    }
    *ties = need;
    return prefix;
  }

  // Bits of all keys above the threshold, and of the first `ties` keys equal to it.
  void emit_with_ties(Key threshold, int64_t ties) const {
    const int64_t count = static_cast<int64_t>(chunks_.size());
    std::vector<int64_t> before(chunks_.size() + 1, 0);  // keys equal to the threshold in earlier chunks
#pragma omp parallel for schedule(static) if (threads_)
    for (int64_t c = 0; c < count; ++c) {
      const Chunk &chunk = chunks_[static_cast<size_t>(c)];
      const Bounds bounds = local_bounds(chunk, threshold, threshold);
      int64_t equal = 0;
      for_blocks(chunk, [&](const Local *keys, int64_t done, int64_t n, bool) {
        uint8_t tied[kBlock / 8];
        compare(keys, n, bounds, chunk.source->bits + ((chunk.start + done) >> 3), tied);
        for (int64_t b = 0; b < (n + 7) >> 3; ++b) equal += __builtin_popcount(tied[b]);
        return true;
      });
      before[static_cast<size_t>(c) + 1] = equal;
    }
    for (size_t c = 1; c < before.size(); ++c) before[c] += before[c - 1];
#pragma omp parallel for schedule(static) if (threads_)
    for (int64_t c = 0; c < count; ++c) {
      const Chunk &chunk = chunks_[static_cast<size_t>(c)];
      const Bounds bounds = local_bounds(chunk, threshold, threshold);
      const size_t at = static_cast<size_t>(c);
      int64_t left = std::min(ties, before[at + 1]) - before[at];  // ties of this chunk that are kept
      if (left <= 0) continue;
      for_blocks(chunk, [&](const Local *keys, int64_t done, int64_t n, bool) {
        uint8_t above[kBlock / 8], tied[kBlock / 8];
        compare(keys, n, bounds, above, tied);
        uint8_t *bits = chunk.source->bits + ((chunk.start + done) >> 3);
        for (int64_t b = 0; b < (n + 7) >> 3 && left > 0; ++b) {
          unsigned kept = tied[b];
          while (__builtin_popcount(kept) > left) kept &= ~(1u << (31 - __builtin_clz(kept)));
          left -= __builtin_popcount(kept);
          bits[b] = static_cast<uint8_t>(bits[b] | kept);
        }
        return left > 0;
      });
    }
  }

  // k = 0 or k = N: nothing to rank, but NaN is still an error.
  int64_t emit_constant(bool keep) const {
    const int64_t nan = find_nan();
    for (const Chunk &chunk : chunks_) {
      uint8_t *bytes = chunk.source->bits + (chunk.start >> 3);
      const int64_t whole = chunk.count >> 3, rest = chunk.count & 7;
      std::fill(bytes, bytes + whole, static_cast<uint8_t>(keep ? 0xff : 0));
      if (rest != 0) bytes[whole] = static_cast<uint8_t>(keep ? (1u << rest) - 1 : 0);
    }
    return nan;
  }

  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

  std::vector<Chunk> chunks_;
  int64_t total_ = 0, k_;
  bool threads_;
  const TopkInner &inner_ = topk_inner();
};

bool any_double(const std::vector<ScoreSource> &sources) {
  return std::any_of(sources.begin(), sources.end(), [](const auto &s) { return s.type == ScoreType::kFloat64; });
}

bool any_exponent(const std::vector<ScoreSource> &sources) {
  return std::any_of(sources.begin(), sources.end(), [&](const auto &s) { return s.exponent != sources[0].exponent; });
}

template <class Value, bool Scaled>
int64_t run(const std::vector<ScoreSource> &sources, const std::vector<Ranking> &rankings) {
  std::vector<int64_t> nan(rankings.size(), -1);
  int64_t largest = 0, total = 0;
  for (const auto &r : rankings) {
    int64_t n = 0;
    for (int64_t l = r.first; l < r.last; ++l) n += sources[static_cast<size_t>(l)].numel;
    largest = std::max(largest, n);
    total += n;
  }
  // Many small layers: one a thread. A large one: threads inside it.
  const bool across = rankings.size() > 1 && largest * 2 <= total && total > kParallel;
  const int64_t count = static_cast<int64_t>(rankings.size());
#pragma omp parallel for schedule(dynamic) if (across)
  for (int64_t r = 0; r < count; ++r) {
    Selector<Value, Scaled> selector(sources, rankings[static_cast<size_t>(r)], !across);
    nan[static_cast<size_t>(r)] = selector.mask();
  }
  for (const int64_t found : nan) {
    if (found >= 0) return found;
  }
  return -1;
}

}  // namespace

int64_t topk_mask(const std::vector<ScoreSource> &sources, const std::vector<Ranking> &rankings) {
  const bool scaled = any_exponent(sources);
  if (any_double(sources)) {
    return scaled ? run<double, true>(sources, rankings) : run<double, false>(sources, rankings);
  }
  return scaled ? run<float, true>(sources, rankings) : run<float, false>(sources, rankings);
}

double kth_largest(const std::vector<ScoreSource> &sources, int64_t k, int64_t *nan) {
  const Ranking ranking{0, static_cast<int64_t>(sources.size()), k};
  if (any_double(sources)) {
    return value_of(Selector<double, false>(sources, ranking, true).kth(nan));
  }
  return value_of(Selector<float, false>(sources, ranking, true).kth(nan));
}

}  // namespace paikern

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

#include "halves.h"
#include "isa.h"
#include "paikern/keys.h"
#include "topk_inner.h"

namespace paikern {
namespace {

constexpr int64_t kBlock = 512;         // scores decoded at a time: stays in L1
constexpr int64_t kChunk = 1 << 16;     // scores of one unit of work, a multiple of 64
constexpr int64_t kSample = 1 << 16;    // a band of about 2.5 % of the scores at k = N / 2
constexpr int64_t kDirect = 1 << 12;    // up to here everything is a candidate
constexpr int64_t kParallel = 1 << 16;  // below this a thread costs more than it brings
constexpr int kDigit = 11;              // radix of the histograms: 2048 counters stay in L1

struct Chunk {
  const ScoreSource *source;
  int64_t start, count;
  int64_t global;  // position of `start` over all sources
  int64_t source_index;
};

const TopkInner &inner() {
  switch (isa()) {
    case Isa::kAvx512:
      return kTopkAvx512;
    case Isa::kAvx2:
      return kTopkAvx2;
    default:
      return kTopkPortable;
  }
}

template <class Key>
struct Candidate {
  Key key;
  int32_t at;  // position in its chunk
};

// How a value becomes a key: plain order, or with the exponent of its layer folded in.
template <class Key, class Value, bool Scaled>
struct KeyOf {
  static Key make(Value value, int64_t offset) {
    if constexpr (Scaled) {
      return scaled_key(value, offset);
    } else {
      (void)offset;
      return ordered_key(value);
    }
  }
};

template <class Value>
void load_factored(const ScoreSource &s, int64_t start, int64_t count, Value *out) {
  int64_t row = start / s.columns, column = start % s.columns;
  for (int64_t done = 0; done < count;) {
    const int64_t run = std::min(count - done, s.columns - column);
    const float g = s.g[row];
    const auto body = [&](auto read) {
      for (int64_t i = 0; i < run; ++i) {
        const float w = std::fabs(read(start + done + i));
        const float powered = s.power == 1 ? w : w * w;
        out[done + i] = static_cast<Value>((powered * s.a[column + i]) * g);
      }
    };
    with_reader(s.data, s.type, body);
    done += run;
    column = 0;
    ++row;
  }
}

template <class Value>
void load(const ScoreSource &s, int64_t start, int64_t count, Value *out) {
  if (s.a != nullptr) {
    load_factored(s, start, count, out);
  } else {
    with_reader(s.data, s.type, [&](auto read) {
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Value>(read(start + i));
    });
  }
  if (s.absolute) {
    for (int64_t i = 0; i < count; ++i) out[i] = std::fabs(out[i]);
  }
  if (s.candidates != nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = start + i;
      if (!((s.candidates[at >> 3] >> (at & 7)) & 1)) out[i] = static_cast<Value>(-1);
    }
  }
}

template <class Key, class Value, bool Scaled>
class Selector {
 public:
  Selector(const std::vector<ScoreSource> &sources, const Ranking &ranking, bool threads)
      : k_(ranking.k), threads_(threads) {
    int64_t lowest = std::numeric_limits<int64_t>::max();
    for (int64_t l = ranking.first; l < ranking.last; ++l) lowest = std::min(lowest, sources[l].exponent);
    lowest_ = ranking.first < ranking.last ? lowest : 0;
    for (int64_t l = ranking.first; l < ranking.last; ++l) {
      const ScoreSource &s = sources[l];
      for (int64_t start = 0; start < s.numel; start += kChunk) {
        chunks_.push_back({&s, start, std::min(kChunk, s.numel - start), total_ + start, l});
      }
      total_ += s.numel;
    }
    threads_ = threads_ && total_ > kParallel;
  }

  int64_t total() const { return total_; }

  // Writes the bits; returns the first source with NaN or -1.
  int64_t mask() {
    Key low = 0, high = std::numeric_limits<Key>::max();  // band: low <= key <= high are candidates
    if (k_ <= 0 || k_ >= total_) return emit_constant(k_ > 0);
    const bool narrow = total_ > kDirect;
    if (narrow) sample_band(&low, &high);
    std::vector<std::vector<Candidate<Key>>> found(chunks_.size());
    std::vector<int64_t> above(chunks_.size(), 0);
    // At most a sixteenth of the scores may be candidates, uneven chunks allowed for.
    const int64_t limit = narrow ? total_ / 16 / static_cast<int64_t>(chunks_.size()) * 4 + 64 : total_;
    const int64_t nan = band_pass(low, high, limit, &found, &above);
    if (nan >= 0) return nan;
    int64_t count_above = 0, inside = 0;
    bool overflow = false;
    for (size_t c = 0; c < chunks_.size(); ++c) {
      overflow |= above[c] < 0;
      count_above += above[c];
      inside += static_cast<int64_t>(found[c].size());
    }
    if (!overflow && count_above <= k_ && k_ <= count_above + inside) {
      settle(found, k_ - count_above);
      return -1;
    }
    Key threshold;
    int64_t ties;
    radix(&threshold, &ties);
    emit_with_ties(threshold, ties);
    return -1;
  }

  // The k-th largest key, 1-based.
  Key kth(int64_t *nan) {
    *nan = find_nan();
    Key threshold = 0;
    int64_t ties;
    if (*nan < 0) radix(&threshold, &ties);
    return threshold;
  }

 private:
  template <class Visit>
  void for_blocks(const Chunk &chunk, Visit visit) const {
    Value values[kBlock];
    Key keys[kBlock];
    const int64_t offset = offset_of(chunk);
    const ScoreSource &s = *chunk.source;
    const bool plain = s.type == ScoreType::kFloat32 && s.a == nullptr && s.candidates == nullptr;
    for (int64_t done = 0; done < chunk.count; done += kBlock) {
      const int64_t n = std::min(kBlock, chunk.count - done);
      if constexpr (std::is_same_v<Key, uint32_t>) {
        const float *from = static_cast<const float *>(s.data) + chunk.start + done;
        if (!plain) {
          load(s, chunk.start + done, n, values);
          from = values;
        }
        if (!visit(keys, done, n, inner_.keys(from, n, plain && s.absolute, keys))) return;
        continue;
      }
      load(s, chunk.start + done, n, values);
      bool nan = false;
      for (int64_t i = 0; i < n; ++i) {
        nan |= values[i] != values[i];
        keys[i] = KeyOf<Key, Value, Scaled>::make(values[i], offset);
      }
      if (!visit(keys, done, n, nan)) return;
    }
  }

  int64_t offset_of(const Chunk &chunk) const {
    return Scaled ? (chunk.source->exponent - lowest_) * (int64_t{1} << (sizeof(Value) == 4 ? 23 : 52)) : 0;
  }

  // A band of keys around rank k that holds it with near certainty, from a strided sample.
  void sample_band(Key *low, Key *high) const {
    std::vector<Key> keys;
    const int64_t sample = std::clamp<int64_t>(total_ / 64, kDirect, kSample);
    keys.reserve(static_cast<size_t>(sample) + chunks_.size());
    const int64_t stride = std::max<int64_t>(1, total_ / sample);
    for (const Chunk &chunk : chunks_) {
      const int64_t first = (stride - chunk.global % stride) % stride;
      const int64_t offset = offset_of(chunk);
      for (int64_t i = first; i < chunk.count; i += stride) {
        Value value;
        load(*chunk.source, chunk.start + i, 1, &value);
        keys.push_back(KeyOf<Key, Value, Scaled>::make(value, offset));
      }
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
    *high = upper < 0 ? std::numeric_limits<Key>::max() : sorted_at(upper);
    *low = lower >= static_cast<int64_t>(keys.size()) ? 0 : sorted_at(lower);
  }

  int64_t band_pass(Key low, Key high, int64_t limit, std::vector<std::vector<Candidate<Key>>> *found,
                    std::vector<int64_t> *above) const {
    int64_t nan_source = std::numeric_limits<int64_t>::max();
    const int64_t count = static_cast<int64_t>(chunks_.size());
#pragma omp parallel for schedule(static) if (threads_) reduction(min : nan_source)
    for (int64_t c = 0; c < count; ++c) {
      const Chunk &chunk = chunks_[static_cast<size_t>(c)];
      auto &mine = (*found)[static_cast<size_t>(c)];
      int64_t over = 0;
      bool overflow = false;
      for_blocks(chunk, [&](const Key *keys, int64_t done, int64_t n, bool nan) {
        if (nan) nan_source = std::min(nan_source, chunk.source_index);
        uint8_t *bytes = chunk.source->bits + ((chunk.start + done) >> 3);
        uint8_t band[kBlock / 8];
        over += compare(keys, n, low, high, bytes, band);
        for (int64_t b = 0; b < (n + 7) >> 3; ++b) {
          for (unsigned left = band[b]; left != 0; left &= left - 1) {
            const int64_t i = 8 * b + __builtin_ctz(left);
            mine.push_back({keys[i], static_cast<int32_t>(done + i)});
          }
        }
        if (static_cast<int64_t>(mine.size()) > limit) overflow = true;
        return !overflow;
      });
      (*above)[static_cast<size_t>(c)] = overflow ? -1 : over;
    }
    return nan_source == std::numeric_limits<int64_t>::max() ? nan_or_none(above) : nan_source;
  }

  int64_t compare(const Key *keys, int64_t count, Key low, Key high, uint8_t *above, uint8_t *band) const {
    if constexpr (std::is_same_v<Key, uint32_t>) {
      return inner_.compare(keys, count, low, high, above, band);
    } else {
      int64_t total = 0;
      for (int64_t i = 0; i < count; i += 8) {
        unsigned over = 0, inside = 0;
        for (int64_t j = 0; j < std::min<int64_t>(8, count - i); ++j) {
          over |= static_cast<unsigned>(keys[i + j] > high) << j;
          inside |= static_cast<unsigned>(keys[i + j] >= low) << j;
        }
        above[i >> 3] = static_cast<uint8_t>(over);
        band[i >> 3] = static_cast<uint8_t>(inside & ~over);
        total += __builtin_popcount(over);
      }
      return total;
    }
  }

  // A chunk that overflowed was not read to its end, so NaN may hide there.
  int64_t nan_or_none(const std::vector<int64_t> *above) const {
    return std::find(above->begin(), above->end(), -1) == above->end() ? -1 : find_nan();
  }

  int64_t find_nan() const {
    int64_t nan_source = std::numeric_limits<int64_t>::max();
    const int64_t count = static_cast<int64_t>(chunks_.size());
#pragma omp parallel for schedule(static) if (threads_) reduction(min : nan_source)
    for (int64_t c = 0; c < count; ++c) {
      const Chunk &chunk = chunks_[static_cast<size_t>(c)];
      for_blocks(chunk, [&](const Key *, int64_t, int64_t, bool nan) {
        if (nan) nan_source = std::min(nan_source, chunk.source_index);
        return !nan;
      });
    }
    return nan_source == std::numeric_limits<int64_t>::max() ? -1 : nan_source;
  }

  // Set the bits of the best `need` candidates; those of one chunk are in order of position.
  void settle(const std::vector<std::vector<Candidate<Key>>> &found, int64_t need) const {
    if (need <= 0) return;
    std::vector<Key> keys;
    for (const auto &part : found) {
      for (const auto &candidate : part) keys.push_back(candidate.key);
    }
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

  // Most significant digit first: the k-th key, and how many keys equal to it are kept.
  void radix(Key *threshold, int64_t *ties) const {
    constexpr int kBits = static_cast<int>(sizeof(Key)) * 8;
    Key prefix = 0;
    int64_t need = k_;
    for (int shift = kBits; shift > 0;) {
      const int next = std::max(0, shift - kDigit);
      const Key digit_mask = static_cast<Key>((Key{1} << (shift - next)) - 1);
      std::vector<int64_t> histogram(static_cast<size_t>(digit_mask) + 1, 0);
      const int64_t count = static_cast<int64_t>(chunks_.size());
#pragma omp parallel if (threads_)
      {
        std::vector<int64_t> mine(histogram.size(), 0);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < count; ++c) {
          for_blocks(chunks_[static_cast<size_t>(c)], [&](const Key *keys, int64_t, int64_t n, bool) {
            for (int64_t i = 0; i < n; ++i) {
              if (shift == kBits || (keys[i] >> (shift % kBits)) == prefix) ++mine[(keys[i] >> next) & digit_mask];
            }
            return true;
          });
        }
#pragma omp critical(paikern_topk_histogram)
        for (size_t b = 0; b < histogram.size(); ++b) histogram[b] += mine[b];
      }
      int64_t bin = static_cast<int64_t>(digit_mask);
      while (bin > 0 && histogram[static_cast<size_t>(bin)] < need) need -= histogram[static_cast<size_t>(bin--)];
      prefix = static_cast<Key>((shift == kBits ? Key{0} : static_cast<Key>(prefix << (shift - next))) |
                                static_cast<Key>(bin));
      shift = next;
    }
    *threshold = prefix;
    *ties = need;
  }

  // Bits of all keys above the threshold, and of the first `ties` keys equal to it.
  void emit_with_ties(Key threshold, int64_t ties) const {
    const int64_t count = static_cast<int64_t>(chunks_.size());
    std::vector<int64_t> equal(chunks_.size() + 1, 0);
#pragma omp parallel for schedule(static) if (threads_)
    for (int64_t c = 0; c < count; ++c) {
      int64_t mine = 0;
      for_blocks(chunks_[static_cast<size_t>(c)], [&](const Key *keys, int64_t, int64_t n, bool) {
        for (int64_t i = 0; i < n; ++i) mine += keys[i] == threshold;
        return true;
      });
      equal[static_cast<size_t>(c) + 1] = mine;
    }
    for (size_t c = 1; c < equal.size(); ++c) equal[c] += equal[c - 1];
#pragma omp parallel for schedule(static) if (threads_)
    for (int64_t c = 0; c < count; ++c) {
      const Chunk &chunk = chunks_[static_cast<size_t>(c)];
      int64_t left = ties - equal[static_cast<size_t>(c)];
      for_blocks(chunk, [&](const Key *keys, int64_t done, int64_t n, bool) {
        uint8_t *bytes = chunk.source->bits + ((chunk.start + done) >> 3);
        for (int64_t i = 0; i < n; i += 8) {
          unsigned byte = 0;
          for (int64_t j = 0; j < std::min<int64_t>(8, n - i); ++j) {
            const bool tie = keys[i + j] == threshold;
            byte |= static_cast<unsigned>(keys[i + j] > threshold || (tie && left > 0)) << j;
            left -= tie;
          }
          bytes[i >> 3] = static_cast<uint8_t>(byte);
        }
        return true;
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

  std::vector<Chunk> chunks_;
  int64_t total_ = 0, k_ = 0, lowest_ = 0;
  bool threads_;
  const TopkInner &inner_ = inner();
};

bool any_double(const std::vector<ScoreSource> &sources) {
  return std::any_of(sources.begin(), sources.end(), [](const auto &s) { return s.type == ScoreType::kFloat64; });
}

bool any_exponent(const std::vector<ScoreSource> &sources) {
  return std::any_of(sources.begin(), sources.end(), [&](const auto &s) { return s.exponent != sources[0].exponent; });
}

template <class Key, class Value, bool Scaled>
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
    Selector<Key, Value, Scaled> selector(sources, rankings[static_cast<size_t>(r)], !across);
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
    return scaled ? run<uint64_t, double, true>(sources, rankings) : run<uint64_t, double, false>(sources, rankings);
  }
  return scaled ? run<uint64_t, float, true>(sources, rankings) : run<uint32_t, float, false>(sources, rankings);
}

double kth_largest(const std::vector<ScoreSource> &sources, int64_t k, int64_t *nan) {
  const Ranking ranking{0, static_cast<int64_t>(sources.size()), k};
  if (any_double(sources)) {
    return value_of(Selector<uint64_t, double, false>(sources, ranking, true).kth(nan));
  }
  return value_of(Selector<uint32_t, float, false>(sources, ranking, true).kth(nan));
}

}  // namespace paikern

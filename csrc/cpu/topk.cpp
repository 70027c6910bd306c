// Exact top-k masks over many tensors, without concatenating them and without a float mask.
//
//   keep[i] = rank(score[i]) < k,  rank by (score descending, position ascending)
//
// Bytes moved: one read of the scores and one bit written per score, against a limit of just that. Steps:
//   1. a band of scores that holds the k-th is guessed, from where it was last time or from a sample (topk_band.h);
//   2. one pass writes the bit "above the band", counts those, and collects what lies in the band;
//   3. the exact rank is found among the collected, ties to the lowest position, and their bits are set;
//   4. bounds of the band that many scores share are counted in that pass, not collected, and a second pass over part
//      of the scores settles which of them stay;
//   5. if the rank missed the band or too much lay in it, histograms give the threshold (topk_radix.h), and 2 and 4
//      are done again with it.
//
// Both checks of step 5 are mandatory: without them a misleading sample would give a wrong mask in silence.
#include "topk.h"

#include "topk_radix.h"

namespace paikern {
namespace {

constexpr int64_t kDirect = 512;  // up to here everything is a candidate
constexpr int64_t kNone = INT64_MAX;

// What a pass found in one chunk.
struct Piece {
  int thread = 0;
  int64_t begin = 0, count = 0;  // its candidates in the scratch of the thread
  int64_t high = 0, low = 0;     // scores equal to the bounds
};

// Everything a selection writes besides its result, kept by the calling thread: a small layer takes a few microseconds,
// of which its dozen allocations would be one.
template <class Value, class Key>
struct Arena {
  struct Candidates {
    TopkBuffer<Value> values;
    TopkBuffer<uint16_t> at;
  };

  std::vector<Candidates> candidates;  // one a thread
  TopkBuffer<Key> sample, keys, work;
  std::vector<Piece> pieces;
  std::vector<TopkBand<Value>> bands;
  std::vector<TopkCounts> counts;
  std::vector<TopkFound<Value>> found;
  std::vector<int64_t> before;

  void shrink() {
    for (auto &mine : candidates) {
      mine.values.shrink();
      mine.at.shrink();
    }
    for (auto *buffer : {&sample, &keys, &work}) buffer->shrink();
    if (pieces.capacity() > (1 << 12)) std::vector<Piece>().swap(pieces);
  }
};

template <class Value, bool Scaled>
class Selector {
 public:
  using Key = typename TopkKeys<Value, Scaled>::Key;
  using Guess = TopkGuess<Key>;
  using Band = TopkBand<Value>;

  Selector(const std::vector<ScoreSource> &sources, const Ranking &ranking, bool threads, bool emit)
      : chunks_(sources, ranking, threads),
        k_(ranking.k),
        memory_(Scaled ? nullptr : ranking.memory),
        emit_(emit),
        arena_(arena()),
        loops_(topk_loops<Value>(topk_inner())) {}
  ~Selector() { arena_.shrink(); }
  Selector(const Selector &) = delete;
  Selector &operator=(const Selector &) = delete;

  // Writes the bits if `emit`, and the k-th key where 0 < k <= total; returns the first source with NaN or -1.
  int64_t run(Key *kth) {
    if (chunks_.total() == 0) return -1;
    const SubnormalsCount guard;
    if (k_ <= 0 || (emit_ && k_ >= chunks_.total())) return emit_constant(k_ > 0);
    Guess guess{};
    bool done = recall(&guess) && pass(guess) && settle(guess, kth);
    if (!done && nan_ < 0) {
      bool guessed = true;
      guess = {};
      if (chunks_.total() <= kDirect) {
        guess.open_low = guess.open_high = true;
      } else {
        const int64_t sampled = sample_keys<Value, Scaled>(chunks_, &arena_.sample);
        // Computed scores are sampled roughly, and may be NaN there that are not.
        guessed = sampled >= 0;
        if (guessed) guess = guess_from(arena_.sample.get(), sampled, k_, chunks_.total(), &arena_.work);
      }
      if (!guessed || !pass(guess)) {
        nan_ = find_nan();
      } else if (nan_ < 0) {
        done = settle(guess, kth) || (beside(&guess) && pass(guess) && settle(guess, kth));
      }
    }
    if (!done && nan_ < 0) {
      guess = exactly(radix_kth<Value, Scaled>(chunks_, k_));
      pass(guess);
      settle(guess, kth);
    }
    if (nan_ < 0) remember(*kth);
    return nan_;
  }

 private:
  static Arena<Value, Key> &arena() {
    static thread_local Arena<Value, Key> mine;
    return mine;
  }

  static Guess exactly(Key key) {
    Guess guess{};
    guess.low = guess.high = key;
    guess.tied_low = guess.tied_high = true;
    return guess;
  }

  // The pass has shown on which side of the band the k-th key is: all of that side, if it is little.
  bool beside(Guess *guess) const {
    const int64_t below = chunks_.total() - above_ - high_ - inside_ - low_;
    const bool over = k_ <= above_;
    if ((over ? above_ : below) > room()) return false;
    Guess next{};
    if (over) {
      next.low = guess->high;
      next.tied_low = next.open_high = true;
    } else {
      next.high = guess->low;
      next.tied_high = next.keep_high = next.open_low = true;
    }
    *guess = next;
    return true;
  }

  // Candidates that a thread may take. A sixteenth, of large rankings a thirty-second, and all of small ones: more is
  // cheaper done otherwise.
  int64_t room() const {
    const int64_t total = chunks_.total();
    return std::min(total, std::max<int64_t>(4096, total >> (total < (1 << 22) ? 4 : 5)));
  }

  // The k-th score is where it was, give or take twice what it moved last time.
  bool recall(Guess *guess) const {
    if constexpr (!Scaled) {
      if (memory_ == nullptr || !std::isfinite(memory_[0]) || !std::isfinite(memory_[1])) return false;
      if (chunks_.total() <= kDirect) return false;
      const double reach = 2.0 * memory_[1] + 1e-6 * std::fabs(memory_[0]);
      guess->low = static_cast<Key>(memory_[0] - reach);
      guess->high = static_cast<Key>(memory_[0] + reach);
      return guess->low == guess->low && guess->high == guess->high;
    }
    return false;
  }

  void remember(Key kth) const {
    if constexpr (!Scaled) {
      if (memory_ != nullptr) {
        memory_[1] = std::fabs(static_cast<double>(kth) - memory_[0]);
        memory_[0] = static_cast<double>(kth);
      }
    }
  }

  const Band &band(int64_t c) const {
    return arena_.bands[Scaled ? static_cast<size_t>(chunks_[c].source_index - chunks_[0].source_index) : 0];
  }

  // One for each source where exponents differ.
  void make_bands(const Guess &guess) {
    arena_.bands.clear();
    int64_t last = -1;
    for (int64_t c = 0; c < (Scaled ? chunks_.size() : 1); ++c) {
      const Chunk &chunk = chunks_[c];
      if (chunk.source_index == last) continue;
      last = chunk.source_index;
      arena_.bands.resize(static_cast<size_t>(last - chunks_[0].source_index) + 1);  // empty sources have no chunk
      arena_.bands.back() = band_of<Value, Scaled>(guess, chunk.shift);
    }
  }

  // Step 2. False: too many candidates, and what was counted means nothing; else nan_ says whether NaN was met.
  bool pass(const Guess &guess) {
    make_bands(guess);
    const auto threads = static_cast<size_t>(chunks_.threads());
    auto &scratch = arena_.candidates;
    if (scratch.size() < threads) scratch.resize(threads);
    arena_.pieces.assign(static_cast<size_t>(chunks_.size()), Piece());
    arena_.counts.assign(threads, TopkCounts{0, 0, 0, false});
    arena_.found.clear();
    for (size_t t = 0; t < threads; ++t) {
      arena_.found.push_back({scratch[t].values.reserve(room()), scratch[t].at.reserve(room()), 0, room()});
    }
    std::atomic<bool> complete{true};
    std::atomic<int64_t> nan_source{kNone};
    chunks_.each([&](int64_t c, int thread) {
      if (!complete.load(std::memory_order_relaxed)) return;
      const Chunk &chunk = chunks_[c];
      const Band &limits = band(c);
      auto &mine = arena_.found[static_cast<size_t>(thread)];
      TopkCounts here{0, 0, 0, false};
      Piece &piece = arena_.pieces[static_cast<size_t>(c)];
      piece.thread = thread;
      piece.begin = mine.count;
      uint8_t unused[kChunk / 8];
      uint8_t *bits = emit_ ? chunk.source->bits + (chunk.start >> 3) : unused;
      if (!for_tiles<Value>(chunk, [&](const Value *values, int64_t at, int64_t n, bool absolute) {
            return loops_.filter(values, n, absolute, limits, at, bits + (at >> 3), &mine, &here);
          })) {
        complete = false;
      }
      piece.count = mine.count - piece.begin;
      piece.high = here.high;
      piece.low = here.low;
      auto &sum = arena_.counts[static_cast<size_t>(thread)];
      sum.above += here.above;
      sum.high += here.high;
      sum.low += here.low;
      if (here.nan) {
        int64_t first = nan_source;
        while (chunk.source_index < first && !nan_source.compare_exchange_weak(first, chunk.source_index)) {
        }
      }
    });
    above_ = high_ = low_ = inside_ = 0;
    for (const auto &sum : arena_.counts) {
      above_ += sum.above;
      high_ += sum.high;
      low_ += sum.low;
    }
    if (guess.keep_high) above_ -= high_;
    for (const auto &mine : arena_.found) inside_ += mine.count;
    nan_ = complete && nan_source != kNone ? nan_source.load() : -1;
    return complete;
  }

  // Steps 3 and 4. False: the k-th key is not where it was looked for.
  bool settle(const Guess &guess, Key *kth) {
    if (nan_ >= 0 || k_ <= above_ || k_ > above_ + high_ + inside_ + low_) return false;
    int64_t need = k_ - above_;
    if (need <= high_) {
      *kth = guess.high;
      settle_ties(guess.high, need, &Piece::high, guess.keep_high);
      return true;
    }
    if (high_ > 0 && !guess.keep_high) settle_ties(guess.high, high_, &Piece::high, false);
    need -= high_;
    if (need <= inside_) {
      int64_t greater = 0;
      *kth = nth_candidate(need, &greater);
      keep_candidates(*kth, need - greater);
    } else {
      *kth = guess.low;
      if (inside_ > 0) keep_candidates(guess.low, 0);
      settle_ties(guess.low, need - inside_, &Piece::low, false);
    }
    return true;
  }

  // The rank-th of the candidates.
  Key nth_candidate(int64_t rank, int64_t *greater) {
    if (!Scaled && chunks_.threads() == 1) {  // they lie in order already
      const auto *only = reinterpret_cast<const Key *>(arena_.candidates[0].values.get());
      return nth_key(only, inside_, rank, &arena_.work, greater);
    }
    Key *keys = arena_.keys.reserve(inside_), *out = keys;
    for (int64_t c = 0; c < chunks_.size(); ++c) {
      const Piece &piece = arena_.pieces[static_cast<size_t>(c)];
      const Value *values = arena_.candidates[static_cast<size_t>(piece.thread)].values.get() + piece.begin;
      for (int64_t i = 0; i < piece.count; ++i) {
        *out++ = TopkKeys<Value, Scaled>::key(values[i], chunks_[c].shift);
      }
    }
    return nth_key(keys, inside_, rank, &arena_.work, greater);
  }

  // Sets the bits of the candidates above `kth` and of the first `ties` equal to it.
  void keep_candidates(Key kth, int64_t ties) {
    if (!emit_) return;
    make_bands(exactly(kth));
    const auto &scratch = arena_.candidates;
    for (int64_t c = 0; c < chunks_.size(); ++c) {
      const Piece &piece = arena_.pieces[static_cast<size_t>(c)];
      const Value *values = scratch[static_cast<size_t>(piece.thread)].values.get() + piece.begin;
      const uint16_t *at = scratch[static_cast<size_t>(piece.thread)].at.get() + piece.begin;
      const Band &limits = band(c);
      uint8_t *bits = chunks_[c].source->bits + (chunks_[c].start >> 3);
      ties = loops_.keep(values, at, piece.count, limits.keep, limits.tie_high, ties, bits);
    }
  }

  // Among the scores equal to `key`, counted by chunk in `equal`, keeps the first `kept`; `set`: all have their bits.
  void settle_ties(Key key, int64_t kept, int64_t Piece::*equal, bool set) {
    if (!emit_) return;
    make_bands(exactly(key));
    auto &before = arena_.before;
    before.assign(arena_.pieces.size() + 1, 0);
    for (size_t c = 0; c < arena_.pieces.size(); ++c) before[c + 1] = before[c] + arena_.pieces[c].*equal;
    chunks_.each([&](int64_t c, int) {
      const size_t at = static_cast<size_t>(c);
      const int64_t tied = before[at + 1] - before[at];
      int64_t left = std::clamp<int64_t>(kept - before[at], 0, tied);
      const Chunk &chunk = chunks_[c];
      uint8_t *bits = chunk.source->bits + (chunk.start >> 3);
      if (left == (set ? tied : 0)) return;  // as the pass wrote them
      for_tiles<Value>(chunk, [&](const Value *values, int64_t done, int64_t n, bool absolute) {
        left = loops_.ties(values, n, absolute, band(c).tie_high, left, bits + (done >> 3));
        return true;
      });
    });
  }

  int64_t find_nan() const {
    std::atomic<int64_t> nan_source{kNone};
    chunks_.each([&](int64_t c, int) {
      const Chunk &chunk = chunks_[c];
      if (nan_source <= chunk.source_index) return;
      for_tiles<Value>(chunk, [&](const Value *values, int64_t, int64_t n, bool) {
        bool nan = false;
        for (int64_t i = 0; i < n; ++i) nan |= values[i] != values[i];
        if (!nan) return true;
        int64_t first = nan_source;
        while (chunk.source_index < first && !nan_source.compare_exchange_weak(first, chunk.source_index)) {
        }
        return false;
      });
    });
    return nan_source == kNone ? -1 : nan_source.load();
  }

  // k = 0 or k = N: nothing to rank, but NaN is still an error.
  int64_t emit_constant(bool keep) const {
    const int64_t nan = find_nan();
    for (int64_t c = 0; c < chunks_.size(); ++c) {
      const Chunk &chunk = chunks_[c];
      uint8_t *bytes = chunk.source->bits + (chunk.start >> 3);
      const int64_t whole = chunk.count >> 3, rest = chunk.count & 7;
      std::fill(bytes, bytes + whole, static_cast<uint8_t>(keep ? 0xff : 0));
      if (rest != 0) bytes[whole] = static_cast<uint8_t>(keep ? (1u << rest) - 1 : 0);
    }
    return nan;
  }

  TopkChunks chunks_;
  int64_t k_;
  double *memory_;
  bool emit_;
  Arena<Value, Key> &arena_;
  const TopkLoops<Value> &loops_;
  int64_t above_ = 0, high_ = 0, inside_ = 0, low_ = 0;  // by order of the scores
  int64_t nan_ = -1;
};

bool any_double(const std::vector<ScoreSource> &sources) {
  return std::any_of(sources.begin(), sources.end(), [](const auto &s) { return s.type == ScoreType::kFloat64; });
}

bool any_exponent(const std::vector<ScoreSource> &sources) {
  return std::any_of(sources.begin(), sources.end(), [&](const auto &s) { return s.exponent != sources[0].exponent; });
}

template <class Value, bool Scaled>
double log2_of(typename TopkKeys<Value, Scaled>::Key kth, const std::vector<ScoreSource> &sources,
               const Ranking &ranking) {
  if constexpr (Scaled && std::is_same_v<Value, float>) {
    int64_t lowest = sources[static_cast<size_t>(ranking.first)].exponent;
    for (int64_t l = ranking.first; l < ranking.last; ++l) {
      lowest = std::min(lowest, sources[static_cast<size_t>(l)].exponent);
    }
    if (kth > 0 && kth < 0x1p61) return scaled_log2(static_cast<int64_t>(kth)) + static_cast<double>(lowest);
  }
  return std::numeric_limits<double>::quiet_NaN();
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
  const bool across = rankings.size() > 1 && largest * 2 <= total && total >= kParallel;
  const int64_t count = static_cast<int64_t>(rankings.size());
#pragma omp parallel for schedule(dynamic) if (across)
  for (int64_t r = 0; r < count; ++r) {
    typename TopkKeys<Value, Scaled>::Key kth{};
    Selector<Value, Scaled> selector(sources, rankings[static_cast<size_t>(r)], !across, true);
    nan[static_cast<size_t>(r)] = selector.run(&kth);
    const Ranking &ranking = rankings[static_cast<size_t>(r)];
    if (ranking.log2_kth) *ranking.log2_kth = log2_of<Value, Scaled>(kth, sources, ranking);
  }
  for (const int64_t found : nan) {
    if (found >= 0) return found;
  }
  return -1;
}

template <class Value>
double kth(const std::vector<ScoreSource> &sources, int64_t k, int64_t *nan) {
  const SubnormalsCount guard;
  Value found{};
  const Ranking ranking{0, static_cast<int64_t>(sources.size()), k};
  *nan = Selector<Value, false>(sources, ranking, true, false).run(&found);
  return found + Value{0};  // -0 and +0 are one score
}

}  // namespace

ScoreLayout coalesce(const std::vector<int64_t> &sizes, const std::vector<int64_t> &strides) {
  ScoreLayout layout;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 1) continue;
    if (!layout.sizes.empty() && layout.strides.back() == strides[d] * sizes[d]) {
      layout.sizes.back() *= sizes[d];
      layout.strides.back() = strides[d];
    } else {
      layout.sizes.push_back(sizes[d]);
      layout.strides.push_back(strides[d]);
    }
  }
  return layout;
}

int64_t topk_mask(const std::vector<ScoreSource> &sources, const std::vector<Ranking> &rankings) {
  const bool scaled = any_exponent(sources);
  if (any_double(sources)) {
    return scaled ? run<double, true>(sources, rankings) : run<double, false>(sources, rankings);
  }
  return scaled ? run<float, true>(sources, rankings) : run<float, false>(sources, rankings);
}

double kth_largest(const std::vector<ScoreSource> &sources, int64_t k, int64_t *nan) {
  return any_double(sources) ? kth<double>(sources, k, nan) : kth<float>(sources, k, nan);
}

}  // namespace paikern

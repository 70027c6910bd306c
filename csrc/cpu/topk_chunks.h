// The scores of one ranking cut into chunks, and loops over them. Chunks are joined in order, so that no result depends
// on how many threads there are or on which of them took a chunk.
#pragma once

#include <omp.h>

#include <atomic>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "path_plan.h"
#include "topk.h"
#include "topk_source.h"

namespace paikern {

constexpr int64_t kChunk = 1 << 16;     // scores; positions in a chunk fit 16 bits
constexpr int64_t kParallel = 3 << 17;  // scores below which a second thread costs more than it brings

struct Chunk {
  const ScoreSource *source;
  int64_t start, count;
  int64_t global;  // position of `start` over all sources
  int64_t source_index;
  int64_t shift;  // exponent of the source above the lowest of the ranking
};

// Subnormal scores count, also in a thread where torch.set_flush_denormal is on: a comparison that reads them as zeros
// would see ties.
class SubnormalsCount {
 public:
#if defined(__SSE2__)
  SubnormalsCount() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }
  ~SubnormalsCount() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

class TopkChunks {
 public:
  TopkChunks(const std::vector<ScoreSource> &sources, const Ranking &ranking, bool threads) {
    int64_t lowest = INT64_MAX;
    size_t chunks = 0;
    for (int64_t l = ranking.first; l < ranking.last; ++l) {
      const ScoreSource &s = sources[static_cast<size_t>(l)];
      lowest = std::min(lowest, s.exponent);
      chunks += static_cast<size_t>((s.numel + kChunk - 1) / kChunk);
    }
    chunks_.reserve(chunks);
    for (int64_t l = ranking.first; l < ranking.last; ++l) {
      const ScoreSource &s = sources[static_cast<size_t>(l)];
      for (int64_t start = 0; start < s.numel; start += kChunk) {
        chunks_.push_back({&s, start, std::min(kChunk, s.numel - start), total_ + start, l, s.exponent - lowest});
      }
      total_ += s.numel;
      computed_ |= s.tiles != nullptr;
    }
    const bool large = total_ >= kParallel || (computed_ && total_ >= kParallel / 16);
    threads_ = threads && large ? static_cast<int>(std::min<int64_t>(omp_get_max_threads(), size())) : 1;
  }

  int64_t total() const { return total_; }
  int64_t size() const { return static_cast<int64_t>(chunks_.size()); }
  int threads() const { return threads_; }
  bool computed() const { return computed_; }  // some scores cost more than a read
  const Chunk &operator[](int64_t c) const { return chunks_[static_cast<size_t>(c)]; }
  auto begin() const { return chunks_.begin(); }

  // body(chunk number, thread number) for every chunk; a thread meets its chunks in rising order.
  template <class Body>
  void each(Body body) const {
    if (threads_ == 1) {
      const SubnormalsCount guard;
      for (int64_t c = 0; c < size(); ++c) body(c, 0);
      return;
    }
    // Handed out one by one: a core that somebody else is using holds nobody up.
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads_)
    {
      const SubnormalsCount guard;
      const int thread = omp_get_thread_num();
      for (int64_t c = next++; c < size(); c = next++) body(c, thread);
    }
  }

 private:
  std::vector<Chunk> chunks_;
  int64_t total_ = 0;
  int threads_;
  bool computed_ = false;
};

// The scores of a chunk, in place or tile by tile: visit(values, position in the chunk, count, absolute) -> go on?
template <class Value, class Visit>
bool for_tiles(const Chunk &chunk, Visit visit) {
  const ScoreSource &s = *chunk.source;
  if (in_place<Value>(s)) {
    return visit(static_cast<const Value *>(s.data) + chunk.start, int64_t{0}, chunk.count, s.absolute);
  }
  Value buffer[kTile];
  if (s.tiles != nullptr) {
    const FloatBuffer scores(chunk.count);
    s.tiles->fill(chunk.start, chunk.count, scores.get());
    if constexpr (std::is_same_v<Value, float>) {
      return visit(scores.get(), int64_t{0}, chunk.count, false);
    } else {
      for (int64_t done = 0; done < chunk.count; done += kTile) {
        const int64_t n = std::min(kTile, chunk.count - done);
        std::copy_n(scores.get() + done, n, buffer);
        if (!visit(buffer, done, n, false)) return false;
      }
      return true;
    }
  }
  const TopkInner &inner = topk_inner();
  for (int64_t done = 0; done < chunk.count; done += kTile) {
    const int64_t n = std::min(kTile, chunk.count - done);
    if (!visit(load(inner, s, chunk.start + done, n, buffer), done, n, absolute_later(s))) return false;
  }
  return true;
}

}  // namespace paikern

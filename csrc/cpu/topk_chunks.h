// The scores of one ranking cut into chunks, and loops over them. Chunks are joined in order, so that no result depends
// on how many threads there are or on which of them took a chunk.
#pragma once

#include <omp.h>

#include <atomic>
#include <optional>
#include <vector>

#include "path_plan.h"
#include "subnormals.h"
#include "topk.h"
#include "topk_source.h"

namespace paikern {

constexpr int64_t kChunk = 1 << 16;     // scores; positions in a chunk fit 16 bits
constexpr int64_t kParallel = 3 << 19;  // below: 1.5e6 scores take 0.4 ms, waiting for a core in use may take 4

struct Chunk {
  const ScoreSource *source;
  int64_t start, count;
  int64_t global;  // position of `start` over all sources
  int64_t source_index;
  int64_t shift;  // exponent of the source above the lowest of the ranking
};

inline bool across(const ScoreLayout *layout) { return layout != nullptr && runs_across(*layout); }

// Scores in a chunk: of layouts that run across, whole bands, which are copied together.
inline int64_t chunk_of(const ScoreSource &s) {
  const ScoreLayout *layout = across(s.layout) ? s.layout : across(s.other_layout) ? s.other_layout : nullptr;
  const int64_t band = layout == nullptr ? kChunk : kBand * layout->sizes.back();
  return band < kChunk ? kChunk / band * band : kChunk;
}

class TopkChunks {
 public:
  TopkChunks(const std::vector<ScoreSource> &sources, const Ranking &ranking, bool threads) {
    int64_t lowest = INT64_MAX;
    size_t chunks = 0;
    for (int64_t l = ranking.first; l < ranking.last; ++l) {
      const ScoreSource &s = sources[static_cast<size_t>(l)];
      lowest = std::min(lowest, s.exponent);
      chunks += static_cast<size_t>(s.numel / chunk_of(s) + 1);
    }
    chunks_.reserve(chunks);
    for (int64_t l = ranking.first; l < ranking.last; ++l) {
      const ScoreSource &s = sources[static_cast<size_t>(l)];
      for (int64_t start = 0, most = chunk_of(s); start < s.numel; start += most) {
        chunks_.push_back({&s, start, std::min(most, s.numel - start), total_ + start, l, s.exponent - lowest});
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

template <class Value, class Visit>
bool visit_tiles(const ScoreSource &s, const Chunk &chunk, Visit visit) {
  const TopkInner &inner = topk_inner();
  Value buffer[kTile];
  for (int64_t done = 0; done < chunk.count; done += kTile) {
    const int64_t n = std::min(kTile, chunk.count - done);
    if (!visit(load(inner, s, chunk.start + done, n, buffer), done, n, absolute_later(s))) return false;
  }
  return true;
}

// The elements of a chunk in order, where they lie across the lines of memory: a tile would use little of each line.
class ChunkCopy {
 public:
  ChunkCopy(const void *data, ScoreType type, const ScoreLayout &layout, const Chunk &chunk)
      : memory_((chunk.count * bytes_of(type) + 3) / 4) {
    if (type == ScoreType::kFloat64) {
      copy<double>(data, layout, chunk);
    } else if (type == ScoreType::kFloat32) {
      copy<float>(data, layout, chunk);
    } else {
      copy<uint16_t>(data, layout, chunk);
    }
  }
  const void *get() const { return memory_.get(); }

 private:
  template <class Word>
  void copy(const void *data, const ScoreLayout &layout, const Chunk &chunk) {
    gather(static_cast<const Word *>(data), layout, chunk.start, chunk.count, reinterpret_cast<Word *>(memory_.get()));
  }

  FloatBuffer memory_;
};

// The scores of a chunk, in place or tile by tile: visit(values, position in the chunk, count, absolute) -> go on?
template <class Value, class Visit>
bool for_tiles(const Chunk &chunk, Visit visit) {
  ScoreSource s = *chunk.source;
  if (in_place<Value>(s)) {
    return visit(static_cast<const Value *>(s.data) + chunk.start, int64_t{0}, chunk.count, s.absolute);
  }
  if (s.tiles != nullptr) {
    const FloatBuffer scores(chunk.count);
    s.tiles->fill(chunk.start, chunk.count, scores.get());
    s.tiles = nullptr;  // from here on, scores that are stored
    s.data = scores.get();
    s.origin = chunk.start;
    return visit_tiles<Value>(s, chunk, visit);
  }
  if (!across(s.layout) && !across(s.other_layout)) return visit_tiles<Value>(s, chunk, visit);
  std::optional<ChunkCopy> data, other;
  const ScoreLayout whole{{s.numel}, {1}};
  data.emplace(s.data, s.type, s.layout != nullptr ? *s.layout : whole, chunk);
  if (s.other != nullptr)
    other.emplace(s.other, s.other_type, s.other_layout != nullptr ? *s.other_layout : whole, chunk);
  s.data = data->get();
  s.other = other ? other->get() : nullptr;
  s.layout = s.other_layout = nullptr;
  s.origin = chunk.start;
  return visit_tiles<Value>(s, chunk, visit);
}

}  // namespace paikern

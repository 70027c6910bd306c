// Exact selection of the k largest of scores that are computed once and never stored: one pass against a band in which
// the k-th is believed to lie, for scores that come layer by layer in any order.
//
//   bits of scores above the band are set at once, scores within it are kept as candidates (12 bytes each), and when
//   all have come the exact rank is found among the candidates
//
// The result is that of topk_mask: score descending, then source index, then position ascending. Where the k-th lies
// beside the band, or too much lies in it, the stream says so and the caller selects another way.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "path_sweep.h"
#include "topk_inner.h"

namespace paikern {

class TopkStream {
 public:
  struct Source {
    int64_t numel;
    uint8_t *bits;  // ceil(numel / 8) bytes
  };

  // Sources in the order that breaks ties. Throws std::invalid_argument beyond 2**19 sources or 2**44 scores in one.
  explicit TopkStream(std::vector<Source> sources);
  ~TopkStream();
  TopkStream(const TopkStream &) = delete;
  TopkStream &operator=(const TopkStream &) = delete;

  // Where the bits of a source go from the next pass on.
  void set_bits(int64_t source, uint8_t *bits) { sources_[static_cast<size_t>(source)].bits = bits; }

  // Starts a pass for the k largest, with the band 2**low .. 2**high, both inclusive. -infinity is the score 0,
  // +infinity itself. Without a band (NaN, or low > high) the pass is made and does not succeed.
  void begin(int64_t k, double low, double high);

  // Whether scores of 0, times 2**exponent, lie below the band: then they may stand for those that may not be kept.
  bool above_zero(int64_t exponent) const { return band_of(exponent).low > 0.0f; }

  // All scores of a source at once, times 2**exponent: see path_sweep. Uses threads by itself.
  void sweep(int64_t source, int64_t exponent, const SweepLayer &layer, float *x);

  // Scores start .. start + count of a source, times 2**exponent; those of weights that may not be kept are -infinity.
  // start is a multiple of 8, and so is count unless the source ends there. Pieces of one pass and one source have one
  // exponent, and may come from several threads at a time and in any order.
  void tile(int64_t source, int64_t exponent, int64_t start, int64_t count, const float *scores);

  // The scores of a source of which few may be kept: those whose bit in `mask` is 1. sparse_row takes the scores of all
  // of them, at base + columns[i], from several threads, no two of them at positions of one byte.
  void sparse(int64_t source, int64_t exponent, const uint8_t *mask);
  void sparse_row(int64_t source, int64_t exponent, int64_t base, const uint16_t *columns, const float *scores,
                  int64_t count);

  // True: the bits are those of the k largest. False: the k-th lies outside the band, candidates were too many, some
  // score was NaN or not all have come; the bits mean nothing.
  bool finish();

  // Gives the memory of candidates back until the next pass: 12 bytes for every 32nd score where a pass had too many.
  void release();

  // Of the pass that ended:
  int64_t above() const { return above_; }
  int64_t candidates() const { return candidates_; }
  int64_t room() const { return room_; }         // candidates that are not too many
  int64_t nan() const;                           // the first source with NaN, or -1
  double log2_kth() const { return log2_kth_; }  // where finish() was true

 private:
  struct Bound {
    double mantissa;  // 1 <= mantissa < 2, or 0 or infinity
    int64_t exponent;
  };
  class Sink;

  SweepBand band_of(int64_t exponent) const;
  void feed(int64_t source, int64_t exponent, int64_t count);
  void keep(int64_t source, const float *scores, const int64_t *positions, int64_t count);
  template <class Key>
  void settle(const Key *keys, int64_t count, int64_t need);

  std::vector<Source> sources_;
  int64_t k_ = 0, total_ = 0, room_;
  Bound low_{}, high_{};
  bool valid_ = false;
  std::unique_ptr<std::atomic<int64_t>[]> exponents_;  // as they were fed in this pass
  std::unique_ptr<float[]> scores_;                    // [room_]; pages that no candidate touches are never there
  std::unique_ptr<int64_t[]> places_;                  // [room_] source and position, in the order of ties
  std::atomic<int64_t> above_{0}, candidates_{0}, fed_{0}, nan_{0};
  double log2_kth_ = 0.0;
};

}  // namespace paikern

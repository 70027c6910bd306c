// Rounds of a path method without returning to Python: both sweeps, then one exact selection over all layers.
//
// A round reads the weights twice: forwards, and in the adjoint sweep, where the scores of a layer meet the band in
// which the k-th of all is expected (topk_stream.h) as they are made. Where it was in the last rounds says where it
// will be. A band that misses costs a third read: the maps of all layers are kept, and the selection of topk.h samples.
// Layers that are thin by then are read from lists of what is left (path_compact.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "flow.h"
#include "path_compact.h"
#include "topk_stream.h"

namespace paikern {

struct RoundsLayer {
  int64_t step;       // its weight step, whose parameter is the number of the layer
  uint8_t *masks[2];  // packed: the current one and the next
};

enum class RoundsStatus : int { kDone = 0, kTime = 1, kDead = 2, kBroken = 3, kNotFinite = 4, kEmptied = 5 };

// Where the k-th score of the next round is looked for, as log2: on the line or the parabola through the last rounds
// over the odds of being kept, whichever was nearer of late, as far around it as it was wrong, and some more. Near both
// ends of a distribution its quantiles move with the odds, and in the middle over a short way with anything.
class KthForecast {
 public:
  // The band for the k largest of `total`, with room for so many candidates; NaN where nothing is known.
  void predict(int64_t k, int64_t total, int64_t room, double *low, double *high);
  // What the round gave, and how many scores lay in the band if they have been counted, else -1.
  void observe(double log2_kth, int64_t candidates);

 private:
  static constexpr int kPoints = 3;
  static constexpr double kFirst = 0.2, kLeast = 0.001;
  double odds_ = NAN, reach_ = NAN;               // of the round at hand
  double guesses_[kPoints] = {};                  // by the last round, the last two and the last three
  double errors_[kPoints] = {NAN, NAN, NAN};      // how far from the truth they were of late
  double at_[kPoints] = {}, log2_[kPoints] = {};  // the last rounds, the latest first
  int points_ = 0;
  double per_log2_ = NAN;  // scores in a band of width 1
};

class PathRounds {
 public:
  // `power` is that of the score. Weights that were pruned stay pruned.
  PathRounds(PathFlow &flow, std::vector<RoundsLayer> layers, int power);

  ~PathRounds();
  PathRounds(const PathRounds &) = delete;
  PathRounds &operator=(const PathRounds &) = delete;

  // Rounds `done`, `done` + 1, ...: keep counts[round][0] over all layers or counts[round][l] in each. Stops after
  // `seconds` and one more round, and with `stop_empty` after a round that leaves a layer without a weight.
  RoundsStatus run(int64_t done, const std::vector<std::vector<int64_t>> &counts, double seconds, bool stop_empty,
                   std::vector<double> *log_flows);

  // One round in two parts, for a cotangent that depends on the outputs: the sweep forwards, which gives log R, and
  // what follows it.
  RoundsStatus begin(double *log_flow);
  RoundsStatus finish(const std::vector<int64_t> &counts, bool stop_empty);

  // Which of the two masks of the layers is the current one.
  int64_t current() const { return current_; }
  int64_t layer_at_fault() const { return fault_; }
  // Rounds whose selection needed no more than the two sweeps.
  int64_t streamed() const { return streamed_; }

 private:
  struct Maps {
    const float *columns, *rows;  // of the stored matrix
    int64_t exponent;
  };

  FlowStep &step(size_t layer) { return flow_.steps()[static_cast<size_t>(layers_[layer].step)]; }
  WeightView view(size_t layer);
  bool stream_layer(size_t layer, float *gx);
  // `candidates` of a stream that failed, else -1.
  int64_t select(const std::vector<int64_t> &counts, int64_t candidates);
  bool emptied();
  void compact();

  PathFlow &flow_;
  std::vector<RoundsLayer> layers_;
  int power_;
  bool begun_ = false;
  int64_t current_ = 0, fault_ = -1, total_ = 0, mapped_ = 0, streamed_ = 0;
  std::vector<Maps> maps_;
  std::vector<std::unique_ptr<CompactLayer>> compact_;
  std::vector<float> scores_;
  std::vector<double> memory_;
  KthForecast forecast_;
  std::unique_ptr<TopkStream> stream_;
};

}  // namespace paikern

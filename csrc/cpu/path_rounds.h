// Rounds of a path method without returning to Python: both sweeps, then one exact selection over all layers.
#pragma once

#include <cstdint>
#include <vector>

#include "flow.h"

namespace paikern {

struct RoundsLayer {
  int64_t step;        // its weight step; its parameter is the layer's number
  uint8_t *masks[2];   // packed: the current one and the next
};

enum class RoundsStatus : int { kDone = 0, kTime = 1, kDead = 2, kBroken = 3, kNotFinite = 4, kEmptied = 5 };

class PathRounds {
 public:
  // `power` is that of the score. Weights that were pruned stay pruned.
  PathRounds(PathFlow &flow, std::vector<RoundsLayer> layers, int power)
      : flow_(flow), layers_(std::move(layers)), power_(power) {}

  // Rounds `done`, `done` + 1, ...: keep counts[round][0] over all layers or counts[round][l] in each. Stops after
  // `seconds` and one more round, and with `stop_empty` after a round that leaves a layer without a weight.
  RoundsStatus run(int64_t done, const std::vector<std::vector<int64_t>> &counts, double seconds, bool stop_empty,
                   std::vector<double> *log_flows);

  // One round in two parts, for a cotangent that depends on the outputs: the sweep forwards, which gives log R, and what
  // follows it.
  RoundsStatus begin(double *log_flow);
  RoundsStatus finish(const std::vector<int64_t> &counts, bool stop_empty);

  // Which of the two masks of the layers is the current one.
  int64_t current() const { return current_; }
  int64_t layer_at_fault() const { return fault_; }

 private:
  int64_t select(const std::vector<int64_t> &counts);
  bool emptied() const;

  PathFlow &flow_;
  std::vector<RoundsLayer> layers_;
  int power_;
  bool begun_ = false;
  int64_t current_ = 0, fault_ = -1;
  std::vector<const float *> x_, g_;
  std::vector<int64_t> exponents_;
  std::vector<float> scores_;
};

}  // namespace paikern

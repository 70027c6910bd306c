// Training steps of DPaI without returning to Python: sweeps, fused update and selection, layer by layer.
//
// A step reads and writes the state (s, and Adam's m and v) once and one bit a weight. Source: DPaI poster,
// algorithm 1.
#pragma once

#include <cstdint>
#include <vector>

#include "flow.h"

namespace paikern {

struct DpaiLayer {
  float *s, *m, *v;     // m, v null for plain ascent
  uint8_t *mask;        // packed, written by every selection
  int64_t numel, k;     // how many are kept
  double lr;            // ascent: per step; Adam: before the bias correction
  double *memory;       // [2], see Ranking
  float *gathered;      // q summed over uses, for a parameter that is used by rows or more than once; else null
  PathGeometry update;  // of such a parameter: one position
  int64_t nodes;        // output units of such a parameter
  bool node_is_channel;
};

struct DpaiSettings {
  double alpha, beta;
  bool adam;
};

struct DpaiRecord {
  double objective;  // log R, or J
  int64_t nodes, kernels, weights;
};

enum class DpaiStatus : int { kDone = 0, kTime = 1, kDead = 2, kBroken = 3, kNotFinite = 4, kUnchanged = 5 };

class DpaiLoop {
 public:
  DpaiLoop(PathFlow &flow, std::vector<DpaiLayer> layers, DpaiSettings settings);

  // The mask of the scores as they are: top-k of |s| in every layer. Returns the layer whose scores are NaN, else -1.
  int64_t select();

  // Up to `steps` steps from step number `done` on, or as many as fit into `seconds` and one more. `patience` > 0:
  // stops once the mask has not changed for so many steps. Records are of the mask before each update.
  DpaiStatus run(int64_t done, int64_t steps, double seconds, int64_t patience, std::vector<DpaiRecord> *records);

  int64_t layer_at_fault() const { return fault_; }
  int64_t unchanged = 0;  // steps since the mask last changed, counted with `patience`

 private:
  bool step(int64_t t, DpaiRecord *record);
  void update(FlowStep &step, const float *x, const float *g, int64_t exponent, const FlowValue &out, int64_t t,
              DpaiRecord *record);
  void gather(FlowStep &step, const DpaiLayer &layer, const float *x, const float *g, float scale);
  void count(int64_t layer, const DpaiCounts &counts, DpaiRecord *record);
  DpaiRule rule(const DpaiLayer &layer, double q_scale, int64_t t) const;
  bool same_masks();

  PathFlow &flow_;
  std::vector<DpaiLayer> layers_;
  DpaiSettings settings_;
  std::vector<uint8_t> live_, before_;
  std::vector<std::vector<uint8_t>> gathered_live_;
  int64_t fault_ = -1;
};

}  // namespace paikern

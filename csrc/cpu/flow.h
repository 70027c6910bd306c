// Both sweeps over a path graph without returning to Python: incoming counts a forwards, outgoing counts g backwards.
//
// The program of a graph is made once (paikern/pathgraph/program.py): steps in order, every map at a fixed address that
// later maps share when it is no longer read. A ResNet-20 has 22 layers of 5 to 50 us each way; calling them one by one
// from Python took longer than running them.
//
// Numbers as in paikern/pathgraph/flow.py: a value is floats times a power of two. After every weight step its maximum
// is brought into [1, 2), exactly; where branches meet, the one with the smaller exponent is shifted.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "path_compact.h"

namespace paikern {

enum class FlowKind : int { kWeight = 0, kAdd = 1, kScale = 2, kRectify = 3, kMean = 4, kMaxPool = 5, kCall = 6 };

struct FlowValue {
  float *a = nullptr, *g = nullptr;
  int64_t numel = 0;
  bool start = false;  // an input: ones, and nothing lies before it
  int64_t a_exponent = 0, g_exponent = 0;
  bool arrived = false;  // g holds a sum
};

// Windows of a two-dimensional max pool over `planes` maps.
struct PoolShape {
  int64_t planes, size[2], out[2], kernel[2], stride[2], padding[2], dilation[2];
};

struct FlowStep {
  FlowKind kind = FlowKind::kCall;
  std::vector<int64_t> inputs;
  int64_t output = 0;

  // kWeight. The view's mask is that of `parameter`, or its bits from `first_bit` on where the step uses some rows.
  PathGeometry geometry{};
  bool transposed = false;  // the stored matrix is used the other way round
  WeightView weight{};
  int64_t parameter = -1, first_bit = 0;
  bool by_rows = false;
  const CompactLayer *compact = nullptr;  // the same weights as lists, where somebody keeps them
  float *divided = nullptr;               // x / max, where inputs are divided by their maximum
  double maximum = 1.0;

  // The output (or, for kMean, the input) as [outer, channels, inner]; `factor` and `offset` are per channel, null for
  // 1 and 0. kMean sums over `channels`.
  int64_t outer = 1, channels = 1, inner = 1;
  const float *factor = nullptr, *offset = nullptr;
  bool average = false;

  PoolShape pool{};
  int32_t *argmax = nullptr;

  std::vector<uint8_t> row_mask;
};

// A step that is replayed by its own code. `forward` leaves the result in the output's `a`; `adjoint` returns one array
// for each input, valid until the next call.
struct FlowCalls {
  std::function<void(int64_t step, const std::vector<int64_t> &exponents)> forward;
  std::function<std::vector<const float *>(int64_t step)> adjoint;
};

struct FlowRules {
  bool by_input_max = false;  // every weight step divides its input by the maximum of it (published DPaI)
  bool counts = false;        // positive values do not sink below 2**-60 of the maximum
};

class PathFlow {
 public:
  // What a weight step hands over in the backward sweep: its score is |w|**p * (g^T x) * 2**exponent. The visitor
  // returns true if it has put the adjoint V^T g where `gx` points; null where nothing lies before the layer.
  using Visit = std::function<bool(FlowStep &step, const float *x, const float *g, int64_t exponent,
                                   const FlowValue &out, float *gx)>;

  PathFlow(std::vector<FlowValue> values, std::vector<FlowStep> steps, std::vector<int64_t> outputs, int64_t parameters,
           FlowRules rules, FlowCalls calls)
      : values_(std::move(values)),
        steps_(std::move(steps)),
        outputs_(std::move(outputs)),
        masks_(static_cast<size_t>(parameters), nullptr),
        cotangent_(outputs_.size(), nullptr),
        rules_(rules),
        calls_(std::move(calls)) {}

  void set_mask(int64_t parameter, const uint8_t *mask) { masks_[static_cast<size_t>(parameter)] = mask; }
  const uint8_t *mask(int64_t parameter) const { return masks_[static_cast<size_t>(parameter)]; }
  // In place of ones; null for ones.
  void set_cotangent(int64_t output, const float *values) { cotangent_[static_cast<size_t>(output)] = values; }

  // log R, or the published objective J; -inf where no path is left, then `dead` is the first step that none gets past.
  // `broken` is the step whose counts overflowed or were NaN, else -1.
  double forward();
  void backward(const Visit &visit);

  // Of the incoming counts of a value.
  int64_t exponent(int64_t id) const { return values_[static_cast<size_t>(id)].a_exponent; }
  int64_t dead() const { return dead_; }
  int64_t broken() const { return broken_; }
  double mantissa() const { return mantissa_; }  // R = mantissa * 2**top
  int64_t top() const { return top_; }
  std::vector<FlowStep> &steps() { return steps_; }
  const FlowRules &rules() const { return rules_; }

 private:
  FlowValue &value(int64_t id) { return values_[static_cast<size_t>(id)]; }
  bool forward_weight(int64_t index);
  void forward_small(int64_t index);
  void backward_weight(FlowStep &step, const Visit &visit);
  void backward_small(int64_t index);
  // Brings the maximum into [1, 2) and returns the exponent taken out; false where it is not finite.
  bool normalise(float *values, int64_t numel, int64_t before, int64_t *shift, float *maximum);
  // Where an adjoint may write: the value itself if it is the first to arrive, else `scratch`.
  float *target(FlowValue &to, FloatBuffer *scratch);
  void arrive(FlowValue &to, const float *part, int64_t exponent);
  double sum_up();

  std::vector<FlowValue> values_;
  std::vector<FlowStep> steps_;
  std::vector<int64_t> outputs_;
  std::vector<const uint8_t *> masks_;
  std::vector<const float *> cotangent_;
  FlowRules rules_;
  FlowCalls calls_;
  double mantissa_ = 0.0, log_maxima_ = 0.0;
  int64_t top_ = 0, dead_ = -1, broken_ = -1;
};

// The small steps, in flow_steps.cpp. Shapes as in FlowStep.
void scale_forward(const FlowStep &step, const float *x, int64_t exponent, float *y);
void scale_adjoint(const FlowStep &step, const float *g, float *gx);
void mean_forward(const FlowStep &step, const float *x, float *y);
void mean_adjoint(const FlowStep &step, const float *g, float *gx);
void max_pool_forward(const PoolShape &pool, const float *x, float *y, int32_t *argmax);
void max_pool_adjoint(const PoolShape &pool, const float *g, const int32_t *argmax, float *gx);

// to = to * 2**to_shift + part * 2**part_shift, shifts <= 0; with a floor, positive values do not sink below it first.
void add_shifted(float *to, int64_t to_shift, const float *part, int64_t part_shift, int64_t numel, float floor);

}  // namespace paikern

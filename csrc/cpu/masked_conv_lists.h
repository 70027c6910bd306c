// What each row of a convolution's product reads: offsets of shifted planes, and values.
#pragma once

#include <vector>

#include "masked_conv.h"
#include "masked_conv_kernels.h"
#include "path_plan.h"

namespace paikern {

class ConvLists {
 public:
  // Lists of the lengths begins[i + 1] - begins[i]; the values lie at `direct` unless it is null.
  ConvLists(std::vector<int64_t> begins, const float *direct)
      : begins_(std::move(begins)), offsets_(kept() + 1), values_(direct ? 1 : kept() + 1), direct_(direct) {}

  int64_t count() const { return static_cast<int64_t>(begins_.size()) - 1; }
  int64_t kept() const { return begins_.back(); }
  int64_t begin(int64_t list) const { return begins_[static_cast<size_t>(list)]; }
  ConvList get(int64_t list) const {
    const int64_t from = begin(list);
    return {offsets_.get() + from, (direct_ ? direct_ : values_.get()) + from, begin(list + 1) - from};
  }
  int32_t *offsets(int64_t list) const { return offsets_.get() + begin(list); }
  float *values(int64_t list) const { return values_.get() + begin(list); }

  // Bounds of about `parts` ranges of lists with as many entries each.
  std::vector<int64_t> split(int64_t parts) const;

 private:
  std::vector<int64_t> begins_;
  Scratch<int32_t> offsets_;
  FloatBuffer values_;
  const float *direct_;
};

// A list for each row of V: (channel, phase, shift) of its columns in their order.
ConvLists forward_lists(const ConvEntries &v, const ConvShape &shape, const ForwardPlan &plan);

// A list for each (channel of X, phase of the stride), in the order of (tap, row of V).
ConvLists input_lists(const ConvEntries &transposed, const ConvShape &shape, const BackwardPlan &plan);

}  // namespace paikern

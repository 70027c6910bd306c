// f and g of PX, sample by sample: a network of ReLUs and the count of the paths that it leaves open.
//
//   f  y = relu(conv(x, theta * M) * scale + shift + branch)
//   g  p = [y > 0] * (conv(p, M) + branch),   from x**2
//
// A chunk of a few samples goes through the whole network before the next one starts, so its maps stay in the caches;
// chunks are independent and their totals are added in order, so the result does not depend on the threads.
//
// Layout: a map is one plane a channel, in which sixteen strips of the images of the chunk lie side by side, so that
// every tap of a convolution is one shift of the plane by whole cache lines (gated_lattice.h). Maps of one size share
// one lattice, so a convolution of stride 1 reads the planes as the layer before wrote them.
//
// Numbers: g has one power-of-two exponent a map and chunk, applied where the map is read; its maximum is known from
// the pass that wrote it. Nothing is rounded by it except what falls 2**-126 below the maximum of its chunk.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace paikern {

struct GatedMap {
  int64_t channels, h, w;
};

enum class GatedKind : int64_t { kWeight = 0, kElementwise = 1, kMean = 2, kMaxPool = 3, kReshape = 4 };

// Maps are numbers in the list given to GatedProgram; `add` is -1 where there is no branch.
struct GatedStep {
  GatedKind kind;
  int64_t in, out, add;
  bool gate;       // a ReLU ends the step
  bool pool_gate;  // kMaxPool: g takes the position of f's maximum
  int64_t groups, kernel[2], stride[2], padding[2], dilation[2];
};

// The weight of `step`: theta [rows, depth] float32, packed mask or null, and scale and shift [rows] of f. A step
// without a weight has only scale and shift. Null scale: 1, null shift: 0.
struct GatedWeight {
  int64_t step;
  const float *theta;
  const uint8_t *mask;
  const float *scale, *shift;
};

class GatedProgram {
 public:
  // Map 0 is the input.
  GatedProgram(std::vector<GatedMap> maps, std::vector<GatedStep> steps, int64_t output);
  ~GatedProgram();

  // Takes the weights of some steps, each once; several threads share the work.
  void load(const std::vector<GatedWeight> &weights);

  // total [channels * h * w of the output] = sum_n g(x_n**2) * 2**-(the result); f [samples, the same] unless null.
  int64_t run(const float *x, int64_t samples, double *total, float *f);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace paikern

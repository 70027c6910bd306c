// Convolutions whose maps have few positions: the last layers of a network on small images, where most weights are.
//
// A 3 x 3 x 512 x 512 weight over 2 x 2 positions is 9.4 MB that meet 28 M multiply-adds: reading it is what counts.
// The map of its columns is copied once to [depth][positions], and then each row of V is decoded once and serves all
// positions: forwards as dot products, and in the adjoint sweep as both V^T g and the score, in the same read. VGG-16
// at 32 x 32, dense, two threads: 8.1 to 4.4 ms forwards, 18.8 to 9.2 ms for the adjoint with scores.
#pragma once

#include <functional>

#include "path.h"

namespace paikern {

constexpr int64_t kFewRange = 128;  // rows that share a table of sums in the adjoint sweep

// Whether the shapes are of this kind, whatever the mask.
bool few_shapes(const PathGeometry &geometry);

// Whether path_forward, path_backward and the scores go this way; the same answer for all three.
bool few_positions(const PathGeometry &geometry, const WeightView &w, double density);

void few_forward(const PathGeometry &geometry, const WeightView &w, const float *x, float *z);

// Whole rows row .. row + rows of [rows, depth], side by side. Called from several threads.
using FewSink = std::function<void(int64_t row, int64_t rows, const float *scores)>;

// gx = V^T g where gx is not null; where x is not null, the scores V * (g x^T), each sum over positions in ascending
// order, to `sink`, 0 for pruned weights. Sums of gx run over rows in ascending order within fixed ranges, then over
// the ranges.
void few_backward(const PathGeometry &geometry, const WeightView &w, const float *x, const float *g, float *gx,
                  const FewSink &sink);

}  // namespace paikern

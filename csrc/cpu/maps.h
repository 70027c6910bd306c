// Small passes over the maps between two weight steps. A map has the size of an activation: what counts is that each
// is one call instead of several.
#pragma once

#include <cstdint>

namespace paikern {

// The largest of numel values (NaN if there is one), 0 for none.
float map_maximum(const float *values, int64_t numel);

// values *= 2**by. With floor > 0, positive values do not sink below it.
void map_scale(float *values, int64_t numel, int by, float floor);

// live[c] = 1 where y > 0 and g != 0 at some position of channel c; maps are [outer, channels, inner].
void live_nodes(const float *y, const float *g, int64_t outer, int64_t channels, int64_t inner, uint8_t *live);

// The derivative of log(max) + f(x / max) with respect to the undivided map, in place over g = df/dx, where x is the
// divided map: g = (g + [x == 1] * (1 - sum g x) / count[x == 1]) / max. Ties share, as in torch.max().
void through_maximum(float *g, const float *x, int64_t numel, double maximum);

}  // namespace paikern

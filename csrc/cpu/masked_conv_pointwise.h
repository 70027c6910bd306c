// Convolutions of one tap and stride 1: float maps are planes as they lie, nothing is copied.
#pragma once

#include "masked_conv.h"
#include "masked_conv_kernels.h"

namespace paikern {

// Whether maps serve as planes. Where small images are not whole vectors apart, loads cross cache lines and the rest of
// a vector is wasted, so a batch is better laid out side by side: 512 x 2048 at 7 x 7 and density 0.1, 8 images, 2.0 ms
// for 2.6.
bool pointwise(const ConvShape &shape, ConvMap map, const ConvKernels &kernels);

void pointwise_output(const ConvShape &shape, const ConvEntries &v, const float *x, const float *bias, float *y,
                      const ConvKernels &kernels);
void pointwise_input(const ConvShape &shape, const ConvEntries &transposed, const float *g, float *x,
                     const ConvKernels &kernels);
void pointwise_kept(const ConvShape &shape, const ConvEntries &v, const float *g, const float *x, float *out,
                    const ConvKernels &kernels);

}  // namespace paikern

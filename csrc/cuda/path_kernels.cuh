// The operations of path counting as kernels of their own, see path_vector.cuh and path_maps.cuh. Vectors and maps have
// kernels each: what the tiles of maps need of registers must not limit how many loads of vectors are on their way.
#pragma once

#include "path_maps.cuh"

#define PK_PRODUCT_PARAMETERS                                                                                  \
  const void *weight, long long type, long long power, const unsigned char *mask, long long first_bit,         \
      const long long *geometry, float *x, float *g, const PaikernScale *x_scale, const PaikernScale *g_scale, \
      PaikernScale *top, float *partial, unsigned *arrived, long long counts, const PaikernScale *source
#define PK_PRODUCT \
  {weight, type, power, mask, first_bit, geometry, x, g, x_scale, g_scale, top, partial, arrived, counts, source}

// By one thread of a product whose maps carry powers of two.
PK_DEVICE void pk_carry_exponent(PaikernScale *top, const PaikernScale *source) {
  if (source != nullptr && blockIdx.x == 0 && threadIdx.x == 0) top->exponent = pk_exponent_of(*source);
}

extern "C" __global__ void __launch_bounds__(256, 3) paikern_path_forward(PK_PRODUCT_PARAMETERS) {
  pk_forward_vector(PK_PRODUCT, blockIdx.x, gridDim.x);
  pk_carry_exponent(top, source);
}

// Of fp32 and of two-byte weights: together they would need more registers than three blocks leave each other.
extern "C" __global__ void __launch_bounds__(256, 3) paikern_path_backward_32(PK_PRODUCT_PARAMETERS) {
  pk_adjoint_rows<0, kPkMeetsNothing>(PK_PRODUCT, {}, blockIdx.x, gridDim.x);
  pk_carry_exponent(top, source);
}

extern "C" __global__ void __launch_bounds__(256, 3) paikern_path_backward_16(PK_PRODUCT_PARAMETERS) {
  pk_adjoint_16<kPkMeetsNothing>(PK_PRODUCT, {}, blockIdx.x, gridDim.x);
  pk_carry_exponent(top, source);
}

extern "C" __global__ void __launch_bounds__(256, 3)
    paikern_path_sweep_32(PK_PRODUCT_PARAMETERS, const float *a, double threshold, unsigned *bits,
                          unsigned long long *found) {
  const PaikernSweep sweep = {a, nullptr, static_cast<float>(threshold), bits, found, 0, 0, nullptr};
  pk_adjoint_rows<0, kPkMeetsThreshold>(PK_PRODUCT, sweep, blockIdx.x, gridDim.x);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    paikern_path_sweep_16(PK_PRODUCT_PARAMETERS, const float *a, double threshold, unsigned *bits,
                          unsigned long long *found) {
  const PaikernSweep sweep = {a, nullptr, static_cast<float>(threshold), bits, found, 0, 0, nullptr};
  pk_adjoint_16<kPkMeetsThreshold>(PK_PRODUCT, sweep, blockIdx.x, gridDim.x);
}

extern "C" __global__ void __launch_bounds__(256) paikern_path_score(PK_PRODUCT_PARAMETERS, double pruned, float *out) {
  pk_score_vector(PK_PRODUCT, static_cast<float>(pruned), out, blockIdx.x, gridDim.x);
}

extern "C" __global__ void __launch_bounds__(256, 2) paikern_path_conv_forward(PK_PRODUCT_PARAMETERS) {
  pk_product_of_maps<kPkForward>(PK_PRODUCT, 0.0f, nullptr, blockIdx.x, gridDim.x);
  pk_carry_exponent(top, source);
}

extern "C" __global__ void __launch_bounds__(256, 2) paikern_path_conv_backward(PK_PRODUCT_PARAMETERS) {
  pk_product_of_maps<kPkAdjoint>(PK_PRODUCT, 0.0f, nullptr, blockIdx.x, gridDim.x);
  pk_carry_exponent(top, source);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    paikern_path_conv_score(PK_PRODUCT_PARAMETERS, double pruned, float *out) {
  pk_product_of_maps<kPkScore>(PK_PRODUCT, static_cast<float>(pruned), out, blockIdx.x, gridDim.x);
}

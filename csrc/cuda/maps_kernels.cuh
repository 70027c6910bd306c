// The passes of maps.cuh as kernels of their own.
#pragma once

#include "maps.cuh"

extern "C" __global__ void __launch_bounds__(256)
    paikern_live_nodes(const float *y, const float *g, long long outer, long long channels, long long inner,
                       unsigned char *live) {
  pk_live_nodes(y, nullptr, g, nullptr, false, outer, channels, inner, live, nullptr, blockIdx.x, gridDim.x);
}

extern "C" __global__ void __launch_bounds__(256)
    paikern_map_maximum(const void *values, long long type, long long count, unsigned long long *top) {
  pk_map_maximum(values, type, count, top, blockIdx.x, gridDim.x);
}

extern "C" __global__ void __launch_bounds__(256)
    paikern_map_scale(float *values, long long count, double factor, double floor) {
  pk_map_scale(values, count, static_cast<float>(factor), static_cast<float>(floor), blockIdx.x, gridDim.x);
}

extern "C" __global__ void __launch_bounds__(256)
    paikern_map_share(const float *g, const float *x, long long count, double *dots, unsigned long long *ties,
                      unsigned *arrived, float *share) {
  pk_map_share(g, x, count, dots, ties, arrived, share, blockIdx.x, gridDim.x);
}

extern "C" __global__ void __launch_bounds__(256)
    paikern_through_maximum(float *g, const float *x, long long count, const float *share, double maximum) {
  pk_through_maximum(g, x, count, share, static_cast<float>(maximum), blockIdx.x, gridDim.x);
}

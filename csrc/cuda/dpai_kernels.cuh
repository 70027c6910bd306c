// The update of dpai.cuh as a kernel of its own.
#pragma once

#include "dpai.cuh"

extern "C" __global__ void __launch_bounds__(256)
    paikern_dpai_update(float *s, float *m, float *v, const unsigned char *mask, const float *q, const float *x,
                        const float *g, const unsigned char *live, const PaikernDpaiRule *rule, const float *q_scale,
                        unsigned long long *found, long long rows, long long columns, long long taps, long long groups,
                        long long transposed) {
  pk_dpai_update({s,    m,    v,       mask,  0,    q,       x,    g,      nullptr,    nullptr,
                  live, rule, q_scale, found, rows, columns, taps, groups, transposed, 0},
                 blockIdx.x, gridDim.x);
}

#pragma once
#include "path.cuh"
PK_DEVICE float pk_tmp_v(const PaikernProduct &p, long long row, long long at) {
  const long long depth = p.geometry[2] / p.geometry[3] * p.geometry[7] * p.geometry[8] * p.geometry[9];
  const long long i = row * depth + at, bit = p.first_bit + i;
  if (p.mask && !((p.mask[bit >> 3] >> (bit & 7)) & 1)) return 0.0f;
  return p.power == 0 ? 1.0f : pk_power(pk_value(p.weight, p.type, i), p.power);
}
template <class F>
PK_DEVICE void pk_tmp_each(const PaikernProduct &p, F f) {
  const long long *q = p.geometry;
  const long long gr = q[1] / q[3], gc = q[2] / q[3];
  for (long long n = 0; n < q[0]; ++n)
    for (long long o = 0; o < q[1]; ++o)
      for (long long a = 0; a < q[19]; ++a)
        for (long long b = 0; b < q[20]; ++b)
          for (long long c = 0; c < q[21]; ++c) {
            long long at = 0;
            for (long long ch = 0; ch < gc; ++ch)
              for (long long i = 0; i < q[7]; ++i)
                for (long long j = 0; j < q[8]; ++j)
                  for (long long k = 0; k < q[9]; ++k, ++at) {
                    const long long x = a * q[10] + i * q[16] - q[13], y = b * q[11] + j * q[17] - q[14],
                                    z = c * q[12] + k * q[18] - q[15];
                    if (x < 0 || x >= q[4] || y < 0 || y >= q[5] || z < 0 || z >= q[6]) continue;
                    const long long channel = o / gr * gc + ch;
                    f(((n * q[2] + channel) * q[4] + x) * q[5] * q[6] + y * q[6] + z,
                      (((n * q[1] + o) * q[19] + a) * q[20] + b) * q[21] + c, o, at);
                  }
          }
}
PK_DEVICE void pk_path_forward(const PaikernProduct &p, long long block, long long) {
  if (block || threadIdx.x) return;
  const PaikernReader r = pk_reader(p.x_scale, p.counts);
  float *g = (float *)p.g;
  const long long *q = p.geometry;
  for (long long i = 0; i < q[0] * q[1] * q[19] * q[20] * q[21]; ++i) g[i] = 0;
  pk_tmp_each(p, [&](long long xi, long long gi, long long o, long long at) {
    g[gi] += pk_tmp_v(p, o, at) * pk_read(r, p.x[xi]);
  });
  float top = 0;
  for (long long i = 0; i < q[0] * q[1] * q[19] * q[20] * q[21]; ++i) top = !(g[i] <= top) ? g[i] : top;
  if (p.top) p.top->top = __float_as_uint(top);
}
PK_DEVICE void pk_path_adjoint(const PaikernProduct &p, long long block, long long) {
  if (block || threadIdx.x) return;
  const PaikernReader r = pk_reader(p.g_scale, p.counts);
  float *x = (float *)p.x;
  const long long *q = p.geometry;
  for (long long i = 0; i < q[0] * q[2] * q[4] * q[5] * q[6]; ++i) x[i] = 0;
  pk_tmp_each(p, [&](long long xi, long long gi, long long o, long long at) {
    x[xi] += pk_tmp_v(p, o, at) * pk_read(r, p.g[gi]);
  });
  float top = 0;
  for (long long i = 0; i < q[0] * q[2] * q[4] * q[5] * q[6]; ++i) top = !(x[i] <= top) ? x[i] : top;
  if (p.top) p.top->top = __float_as_uint(top);
}

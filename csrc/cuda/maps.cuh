// Passes over maps of path counts between two products: which units are alive, the largest value, a power of two times
// a map, the derivative through a division by the maximum.
//
//   live[c] = any y[n, c, i] > 0 with g[n, c, i] != 0     one thread, one warp or one block a unit, by its entries
//   maximum                                               an order-free maximum of keys, NaN above all
//   scale   t * 2**by, positive values at least `floor`   in place
//   share   (1 - sum of g * x) / ties, ties: x == 1       float64, 8192 values a part, parts in order, one after the
//   other through (g + [x == 1] * share) / maximum              in place
//
// Bytes moved: every map once, twice where it is written. Limit: memory bandwidth; maps are small, so that it is the
// launch more often. Not yet measured on a GPU.
#pragma once

#include "path.cuh"

PK_DEVICE bool pk_alive(const PaikernReader &y_reader, const PaikernReader &g_reader, float y, float g) {
  return pk_read(y_reader, y) > 0.0f && pk_read(g_reader, g) != 0.0f;
}

// y, g: [outer, channels, inner]; live: [channels]; nodes: raised by how many live, or null.
PK_DEVICE void pk_live_nodes(const float *y, const PaikernScale *y_scale, const float *g, const PaikernScale *g_scale,
                             bool counts, long long outer, long long channels, long long inner, unsigned char *live,
                             unsigned long long *nodes, long long block, long long blocks) {
  const PaikernReader y_reader = pk_reader(y_scale, counts), g_reader = pk_reader(g_scale, counts);
  const long long each = outer * inner;
  // Threads of a unit: a power of two, a whole block at most.
  const int team = each <= 8 || inner == 1 ? 1 : each < 2048 ? 32 : kPkBlock, units = kPkBlock / team;
  const int mine = static_cast<int>(threadIdx.x) / team, first = static_cast<int>(threadIdx.x) % team;
  unsigned long long found = 0;
  for (long long group = block; group < pk_ceil(channels, units); group += blocks) {
    const long long channel = group * units + mine;
    int any = 0;
    if (channel < channels) {
      for (long long i = first; i < each && any == 0; i += team) {
        const long long n = i / inner, at = (n * channels + channel) * inner + (i - n * inner);
        any = pk_alive(y_reader, g_reader, y[at], g[at]);
      }
    }
    if (team == 32) any = __any_sync(0xffffffffu, any);
    if (team == kPkBlock) any = __syncthreads_or(any);
    if (channel >= channels || first != 0) continue;
    live[channel] = static_cast<unsigned char>(any);
    found += static_cast<unsigned>(any);
  }
  if (nodes != nullptr && found != 0) atomicAdd(nodes, found);
}

// top: raised to the key of the largest value (ordered_bits), that of a NaN being all ones.
PK_DEVICE void pk_map_maximum(const void *values, long long type, long long count, unsigned long long *top,
                              long long block, long long blocks) {
  unsigned best = 0;
  for (long long i = block * kPkBlock + threadIdx.x; i < count; i += blocks * kPkBlock) {
    const float value = pk_value(values, type, i);
    const unsigned key = value != value ? 0xffffffffu : paikern::ordered_bits(__float_as_uint(value));
    best = key > best ? key : best;
  }
  for (int by = 16; by > 0; by /= 2) {
    const unsigned other = __shfl_xor_sync(0xffffffffu, best, by);
    best = other > best ? other : best;
  }
  if (threadIdx.x % 32 == 0) atomicMax(top, static_cast<unsigned long long>(best));
}

// floor 0: none.
PK_DEVICE void pk_map_scale(float *values, long long count, float factor, float floor, long long block,
                            long long blocks) {
  for (long long i = block * kPkBlock + threadIdx.x; i < count; i += blocks * kPkBlock) {
    const float value = values[i], scaled = __fmul_rn(value, factor);
    values[i] = value > 0.0f && scaled < floor ? floor : scaled;
  }
}

constexpr long long kPkShare = 8192;  // values of a part

// What the threads of a block add up, in every thread: lanes pairwise, then warp after warp.
PK_DEVICE double pk_block_sum(double value) {
  PaikernScratch &scratch = pk_scratch();
  for (int by = 16; by > 0; by /= 2) value = __dadd_rn(value, __shfl_xor_sync(0xffffffffu, value, by));
  __syncthreads();  // between functions: whoever had the scratch before
  if (threadIdx.x % 32 == 0) scratch.sums[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = scratch.sums[0];
  for (int warp = 1; warp < kPkBlock / 32; ++warp) sum = __dadd_rn(sum, scratch.sums[warp]);
  return sum;
}

// share: what each entry at the maximum receives. dots: [ceil(count / kPkShare)]; ties, arrived: zero between launches.
PK_DEVICE void pk_map_share(const float *g, const float *x, long long count, double *dots, unsigned long long *ties,
                            unsigned *arrived, float *share, long long block, long long blocks) {
  const long long parts = pk_ceil(count, kPkShare);
  for (long long part = block; part < parts; part += blocks) {
    const long long end = pk_least(count, (part + 1) * kPkShare);
    double sum = 0.0;
    unsigned long long ones = 0;
    for (long long i = part * kPkShare + threadIdx.x; i < end; i += kPkBlock) {
      sum = __dadd_rn(sum, __dmul_rn(static_cast<double>(g[i]), static_cast<double>(x[i])));
      ones += x[i] == 1.0f;
    }
    for (int by = 16; by > 0; by /= 2) ones += __shfl_xor_sync(0xffffffffu, ones, by);
    if (threadIdx.x % 32 == 0 && ones != 0) atomicAdd(ties, ones);
    sum = pk_block_sum(sum);
    if (threadIdx.x == 0) dots[part] = sum;
    if (!pk_last_of(arrived, parts)) continue;
    double total = 0.0;
    for (long long i = threadIdx.x; i < parts; i += kPkBlock) total = __dadd_rn(total, dots[i]);
    total = pk_block_sum(total);
    if (threadIdx.x == 0) {
      const double shared = *ties == 0 ? 1.0 : static_cast<double>(*ties);
      *share = static_cast<float>(__ddiv_rn(__dadd_rn(1.0, -total), shared));
      *ties = 0;
    }
  }
}

PK_DEVICE void pk_through_maximum(float *g, const float *x, long long count, const float *share, float maximum,
                                  long long block, long long blocks) {
  const float extra = *share;
  for (long long i = block * kPkBlock + threadIdx.x; i < count; i += blocks * kPkBlock) {
    g[i] = __fdiv_rn(__fadd_rn(g[i], x[i] == 1.0f ? extra : 0.0f), maximum);
  }
}

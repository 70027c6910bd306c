// Random walks biased by magnitude, in both directions, one thread a walk (csrc/cpu/phew.h describes them).
//
// Before a weight a walk draws a block of kernels by the tables, then a kernel by adding up those of the block, then an
// element by its share of the kernel; between weights it chooses uniformly among the slots that take its unit, and
// among the units there. Hop h of walk t draws Philox4x32-10 of (t, h): no thread needs another, and the bits of every
// walk are those of the CPU. Walks of even number go forwards, odd ones backwards: the first half of the threads has
// one kind, the second the other, so that but for one warp all threads of a warp go the same way.
//
// Bytes moved, a weight of a walk: a few entries of a table in one line of memory, 4 to 16 kernels read twice, the
// second time from the caches, 8 bytes written. Limit: the latency of these reads, which follow from one another;
// blocks are of one warp, so that a batch of a few hundred walks is spread over the device. Not yet measured on a GPU.
//
// Device code without standard headers: nvcc, NVRTC and csrc/testing/cuda_on_cpu.h compile the same text.
#pragma once

#include "phew_tables.cuh"
#include "philox.cuh"

// Ten numbers: an address, a type, and a row of the geometry.
struct PaikernWalkWeight {
  const void *data;
  long long type, rows, cols, taps, groups;
  long long transposed;      // rows are inputs, not outputs
  long long base;            // number of its first bit, -1 where it takes no part in the mask
  long long by_row, by_col;  // where its tables begin
};

// The walk graph; a list at `l` of the index says that unit u meets index[index[l + u]] to [.. index[l + u + 1]].
struct PaikernWalks {
  const PaikernWalkWeight *weights;
  const float *tables;
  const long long *nodes;  // [nodes, 8]: kind, weight, first unit, units, links begin, end, slots begin, end
  const long long *slots;  // [slots, 2]: node, list
  const long long *links;  // [links, 2]: slot, list
  const int *index;
  const int *owner;         // [units]: node of every unit
  const int *starts;        // input units
  long long count, inputs;  // of nodes and of starts
};

constexpr long long kPkInputNode = 0, kPkWeightNode = 1, kPkOutputNode = 3;

struct PaikernWalk {
  long long node, unit;
  uint4 words;
  bool forwards;
};

PK_DEVICE long long pk_met(const PaikernWalks &graph, long long list, long long unit) {
  return graph.index[list + unit + 1] - graph.index[list + unit];
}

PK_DEVICE long long pk_one_met(const PaikernWalks &graph, long long list, PaikernWalk *walk) {
  const long long count = pk_met(graph, list, walk->unit), begin = graph.index[list + walk->unit];
  return graph.index[begin + pk_choose(&walk->words.w, count)];
}

PK_DEVICE void pk_stand_on(const PaikernWalks &graph, long long unit, PaikernWalk *walk) {
  walk->node = graph.owner[unit];
  walk->unit = unit - graph.nodes[8 * walk->node + 2];
}

// From a unit to one that it meets, or is met by, in one of the slots that take it; false where none does. `ways` are
// the links of a node forwards, its slots backwards: pairs whose second number is a list.
PK_DEVICE bool pk_go(const PaikernWalks &graph, PaikernWalk *walk) {
  const long long *node = graph.nodes + 8 * walk->node, *ways = walk->forwards ? graph.links : graph.slots;
  const long long begin = walk->forwards ? node[4] : node[6], end = walk->forwards ? node[5] : node[7];
  long long open = 0;
  for (long long i = begin; i < end; ++i) open += pk_met(graph, ways[2 * i + 1], walk->unit) > 0;
  if (open == 0) return false;
  long long chosen = pk_choose(&walk->words.w, open), way = begin;
  for (;; ++way) {
    if (pk_met(graph, ways[2 * way + 1], walk->unit) > 0 && chosen-- == 0) break;
  }
  const long long unit = pk_one_met(graph, ways[2 * way + 1], walk);
  if (walk->forwards) {
    walk->unit = unit;
    walk->node = graph.slots[2 * ways[2 * way]];
  } else {
    pk_stand_on(graph, unit, walk);
  }
  return true;
}

// The first of `count` ascending entries above u, -1 where there is none. Shares are alike in most weights: the search
// begins where the entry would be if they were equal.
PK_DEVICE long long pk_first_above(const float *table, long long count, double u) {
  long long low = 0, high = static_cast<long long>(__dmul_rn(u, static_cast<double>(count)));
  if (static_cast<double>(table[high]) > u) {
    for (long long step = 1; high > 0; step *= 2) {
      const long long at = high > step ? high - step : 0;
      if (!(static_cast<double>(table[at]) > u)) {
        low = at + 1;
        break;
      }
      high = at;
    }
  } else {
    for (long long step = 1;; step *= 2) {
      low = high + 1;
      if (low == count) return -1;
      high = high + step < count - 1 ? high + step : count - 1;
      if (static_cast<double>(table[high]) > u) break;
    }
  }
  while (low < high) {
    const long long middle = low + (high - low) / 2;
    if (static_cast<double>(table[middle]) > u) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// The first of the ascending sums of values above `aim` times their sum; where rounding leaves none, the first that
// reaches it. value(i) is called twice for each of the `count`. -1 where the sum is not above 0.
template <class Value>
PK_DEVICE long long pk_drawn(long long count, double aim, Value value) {
  double sum = 0.0, upto = 0.0;
  for (long long i = 0; i < count; ++i) sum = __dadd_rn(sum, value(i));
  const double above = __dmul_rn(aim, sum);
  long long first = 0, reached = -1;
  for (long long i = 0; i < count; ++i) {
    upto = __dadd_rn(upto, value(i));
    first += upto <= above;
    if (reached < 0 && !(upto < sum)) reached = i;
  }
  if (!(sum > 0.0)) return -1;
  return first < count ? first : reached;
}

// The number of a kernel in the block that begins with `first`, and that of one of its elements.
template <int kType>
PK_DEVICE long long pk_draw(const PaikernWalkWeight &weight, long long first, long long stride, long long size,
                            double at, long long weighting, unsigned word, bool whole, long long *tap) {
  long long chosen = 0;
  if (size > 1) {
    chosen = pk_drawn(size, at, [&](long long j) {
      return pk_share<kType>(weight.data, first + j * stride, weight.taps, weighting);
    });
    if (chosen < 0) chosen = 0;
  }
  const long long kernel = first + chosen * stride;
  *tap = 0;
  if (weight.taps > 1 && !whole) {
    const double u = __dmul_rn(static_cast<double>(word), 0x1p-32);
    *tap = pk_drawn(weight.taps, u,
                    [&](long long t) { return pk_magnitude<kType>(weight.data, kernel * weight.taps + t, weighting); });
    if (*tap < 0) *tap = static_cast<long long>(__dmul_rn(u, static_cast<double>(weight.taps)));
  }
  return chosen;
}

// The walk stands before a weight by a unit of one side and leaves it by one of the other. Returns the kernel.
PK_DEVICE long long pk_through(const PaikernWalkWeight &weight, const float *tables, PaikernWalk *walk,
                               long long weighting, bool whole, long long *tap) {
  // Units, rows and columns have 32 bits, and so have their quotients: those of 64 are routines.
  const int cols = static_cast<int>(weight.cols), unit = static_cast<int>(walk->unit);
  const int group_rows = static_cast<int>(weight.rows) / static_cast<int>(weight.groups);
  const bool along = walk->forwards == (weight.transposed != 0);  // a row
  const int group = unit / (along ? group_rows : cols), block = (along ? 4 : 2) - (weight.taps >= 4 ? 2 : 0);
  const long long most = 1ll << block, length = along ? cols : group_rows, stride = along ? 1 : cols;
  const long long blocks = (length + most - 1) >> block;
  const float *table = tables + (along ? weight.by_row : weight.by_col) + unit * blocks;
  long long first = static_cast<long long>(along ? unit : group * (group_rows - 1)) * cols + (along ? 0 : unit);
  const unsigned long long mantissa = (static_cast<unsigned long long>(walk->words.x) << 21) | (walk->words.y >> 11);
  const double u = __dmul_rn(static_cast<double>(mantissa), 0x1p-53);
  const long long found = pk_first_above(table, blocks, u);
  long long begin, size = 1;
  double at = 0.0;
  if (found < 0) {
    begin = static_cast<long long>(__dmul_rn(u, static_cast<double>(length)));
  } else {
    const double below = found == 0 ? 0.0 : static_cast<double>(table[found - 1]);
    at = __ddiv_rn(__dadd_rn(u, -below), __dadd_rn(static_cast<double>(table[found]), -below));
    begin = found << block;
    size = most < length - begin ? most : length - begin;
  }
  first += begin * stride;
  long long chosen;
  if (weight.type == 0) {
    chosen = pk_draw<0>(weight, first, stride, size, at, weighting, walk->words.z, whole, tap);
  } else if (weight.type == 1) {
    chosen = pk_draw<1>(weight, first, stride, size, at, weighting, walk->words.z, whole, tap);
  } else if (weight.type == 2) {
    chosen = pk_draw<2>(weight, first, stride, size, at, weighting, walk->words.z, whole, tap);
  } else {
    chosen = pk_draw<3>(weight, first, stride, size, at, weighting, walk->words.z, whole, tap);
  }
  walk->unit = static_cast<long long>(group) * (along ? cols : group_rows) + begin + chosen;
  return first + chosen * stride;
}

// out [count, width], filled with -1: the bits that walks first .. first + count - 1 pass.
extern "C" __global__ void paikern_phew_walks(const PaikernWalks *graph_at, long long seed, long long first,
                                              long long count, long long width, long long weighting, long long whole,
                                              long long *out) {
  const PaikernWalks &graph = *graph_at;
  const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  const long long ahead = (count + 1) / 2;
  if (thread >= count) return;
  const long long place = thread < ahead ? 2 * thread : 2 * (thread - ahead) + 1, number = first + place;
  out += place * width;
  PaikernWalk walk;
  walk.forwards = number % 2 == 0;
  const long long turn = number / 2, *last = graph.nodes + 8 * (graph.count - 1);
  walk.node = graph.count - 1;
  walk.unit = turn % last[3];
  if (walk.forwards) pk_stand_on(graph, graph.starts[turn % graph.inputs], &walk);
  long long length = 0;
  bool open = true;
  for (unsigned hop = 0; open; ++hop) {
    const long long *node = graph.nodes + 8 * walk.node;
    if (node[0] == (walk.forwards ? kPkOutputNode : kPkInputNode)) return;
    walk.words =
        pk_philox(make_uint4(static_cast<unsigned>(number), static_cast<unsigned>(number >> 32), hop, 0u), seed);
    const bool behind = !walk.forwards && node[0] == kPkWeightNode;
    if (!behind) {
      open = pk_go(graph, &walk);
      if (!open || !walk.forwards || graph.nodes[8 * walk.node] != kPkWeightNode) continue;
    }
    const PaikernWalkWeight &weight = graph.weights[graph.nodes[8 * walk.node + 1]];
    long long tap;
    const long long kernel = pk_through(weight, graph.tables, &walk, weighting, whole != 0, &tap);
    if (weight.base >= 0) {
      const long long from = weight.base + kernel * weight.taps + tap, bits = whole ? weight.taps : 1;
      for (long long bit = from; bit < from + bits && length < width; ++bit) out[length++] = bit;
    }
    if (behind) {
      const long long list = graph.slots[2 * node[6] + 1];
      open = pk_met(graph, list, walk.unit) > 0;
      if (open) pk_stand_on(graph, pk_one_met(graph, list, &walk), &walk);
    }
  }
  while (length > 0) out[--length] = -1;  // no successor
}

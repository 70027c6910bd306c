// Both sweeps over a path graph on the device: a table of instructions that kernels walk, without a word to the host.
//
//   reset, fill, forward, adjoint, join, scale, mean, pool, total, record, ...   (PaikernFlowStep below)
//
// The table is made once (paikern/pathgraph/device_program.py): every map has its place, every weight its geometry, and
// every value that is written a slot of its own for its power of two, so that nobody reads a slot while somebody else
// rewrites it. Numbers as in paikern/pathgraph/flow.py: after every weight step the largest value is brought into
// [1, 2), here when it is read (map_scale.cuh).
//
// `paikern_flow` runs instructions [from, to) of the table. One instruction: any number of blocks. Several: a grid
// whose blocks are all on the device at the same time, with a barrier between two instructions; a network of many small
// layers is then one launch a sweep. Results have the same bits either way, since no instruction depends on the grid.
//
// Bytes moved: those of the products (path_*.cuh), and each map once or twice. Limit: for small layers the barriers,
// one a layer. Not yet measured on a GPU.
#pragma once

#include "flow_steps.cuh"

// What a sweep writes for the host, one row a round.
struct PaikernFlowRecord {
  double mantissa;  // R = mantissa * 2**top
  long long top;
  long long dead;    // first weight step that no path gets past, or -1
  long long broken;  // first weight step, forwards and then backwards, whose values are not finite, or -1
  long long empty;   // first layer without a weight, or -1
  long long nodes, kernels, weights;  // of a training step
};

// --- instructions of one block -----------------------------------------------------------------------------------

// The lowest of what the threads of a block hold, in all of them.
PK_DEVICE long long pk_lowest_of_block(long long value) {
  __shared__ long long lowest;
  __syncthreads();
  if (threadIdx.x == 0) lowest = 0x7fffffffffffffffll;
  __syncthreads();
  atomicMin(&lowest, value);
  __syncthreads();
  return lowest;
}

// A sum with one order: of each thread's values, then of the threads.
PK_DEVICE double pk_sum_of_block(double value) {
  __shared__ double sums[kPkThreads];
  __syncthreads();
  sums[threadIdx.x] = value;
  for (unsigned half = kPkThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  __syncthreads();
  return sums[0];
}

// R, the sum of the outputs (times the cotangent, if there is one).
PK_DEVICE void pk_flow_total(const PaikernFlowStep &step) {
  long long top = -0x7fffffffffffffffll;
  for (long long t = 0; t < step.term_count; ++t) {
    const long long exponent = pk_exponent_of(*step.terms[t].scale);
    top = exponent > top ? exponent : top;
  }
  double mantissa = 0.0;
  for (long long t = 0; t < step.term_count; ++t) {
    const PaikernTerm &term = step.terms[t];
    const PaikernReader reader = pk_reader(term.scale, step.counts != 0);
    double sum = 0.0;
    for (long long i = threadIdx.x; i < term.numel; i += kPkThreads) {
      sum += static_cast<double>(pk_read(reader, term.values[i]));
    }
    mantissa += pk_sum_of_block(sum) * pk_double_power(pk_exponent_of(*term.scale) - top);
  }
  if (threadIdx.x == 0) {
    PaikernFlowRecord &now = *static_cast<PaikernFlowRecord *>(step.data);
    now.mantissa = mantissa;
    now.top = top;
  }
}

// What became of the round: the record as it stands goes to its row. Terms are the slots of the weight steps, those of
// the sweep forwards first (`channels` of them, numbers `inner` in `pool`).
PK_DEVICE void pk_flow_record(const PaikernFlowStep &step) {
  long long dead = 0x7fffffffffffffffll, broken = dead;
  for (long long t = threadIdx.x; t < step.term_count; t += kPkThreads) {
    const unsigned long long top = step.terms[t].scale->top;
    if (t < step.channels && top == 0 && t < dead) dead = t;
    if (top >= 0x7f800000ull && t < broken) broken = t;
  }
  dead = pk_lowest_of_block(dead);
  broken = pk_lowest_of_block(broken);
  if (threadIdx.x != 0) return;
  const auto number = [&](long long t) { return t < step.term_count ? step.terms[t].numel : -1ll; };
  PaikernFlowRecord *rows = static_cast<PaikernFlowRecord *>(step.data);
  PaikernFlowRecord &now = rows[0];
  now.dead = number(dead);
  now.broken = number(broken);
  rows[1 + *step.round] = now;
}

// A new round: slots, counters and the record are put back, and the numbers of this round brought to where kernels
// look for them. `pool` points to the round's number of pairs (from, to, count a round, of eight bytes each).
PK_DEVICE void pk_flow_reset(const PaikernFlowStep &step) {
  PaikernFlowRecord &now = *static_cast<PaikernFlowRecord *>(step.data);
  if (threadIdx.x == 0) {
    *step.round += 1;
    now = {0.0, 0, -1, -1, -1, 0, 0, 0};
  }
  __syncthreads();
  const long long round = *step.round;
  for (long long i = threadIdx.x; i < step.numel; i += kPkThreads) step.scale[i] = {0, 0};
  for (long long t = 0; t < step.term_count; ++t) {
    const long long count = step.terms[t].numel;
    const long long *from = reinterpret_cast<const long long *>(step.terms[t].values) + round * count;
    long long *to = reinterpret_cast<long long *>(step.terms[t].to);
    for (long long i = threadIdx.x; i < count; i += kPkThreads) to[i] = from[i];
  }
}

// The exponents of the scores of all layers: of what comes in and of what goes out, terms 2 l and 2 l + 1.
PK_DEVICE void pk_flow_exponents(const PaikernFlowStep &step) {
  long long *exponents = static_cast<long long *>(step.data);
  for (long long l = threadIdx.x; 2 * l < step.term_count; l += kPkThreads) {
    exponents[l] = pk_exponent_of(*step.terms[2 * l].scale) + pk_exponent_of(*step.terms[2 * l + 1].scale);
  }
}

// --- the table -----------------------------------------------------------------------------------------------------

PK_DEVICE void pk_flow_step(const PaikernFlowStep &step, long long block, long long blocks) {
  switch (step.kind) {
    case kPkFlowForward:
      pk_path_forward(step.product, block, blocks);
      break;
    case kPkFlowAdjoint:
      pk_path_adjoint(step.product, block, blocks);
      break;
    case kPkFlowFill:
      pk_flow_fill(step, block, blocks);
      break;
    case kPkFlowJoin:
      pk_flow_join(step, block, blocks);
      break;
    case kPkFlowNormalise:
      pk_flow_normalise(step, block, blocks);
      break;
    case kPkFlowScale:
      pk_flow_scale(step, block, blocks);
      break;
    case kPkFlowMean:
      pk_flow_mean(step, block, blocks);
      break;
    case kPkFlowSpread:
      pk_flow_spread(step, block, blocks);
      break;
    case kPkFlowPool:
      pk_flow_pool(step, block, blocks);
      break;
    case kPkFlowUnpool:
      pk_flow_unpool(step, block, blocks);
      break;
    case kPkFlowBits:
      pk_flow_bits(step, block, blocks);
      break;
    default:
      if (block != 0) return;
      if (step.kind == kPkFlowReset) pk_flow_reset(step);
      if (step.kind == kPkFlowTotal) pk_flow_total(step);
      if (step.kind == kPkFlowRecord) pk_flow_record(step);
      if (step.kind == kPkFlowExponents) pk_flow_exponents(step);
  }
  // The exponent of what was written: that of what was read. Where terms are joined, pk_flow_join says it.
  if (block == 0 && threadIdx.x == 0 && step.from != nullptr) step.scale->exponent = pk_exponent_of(*step.from);
}

// Waits until all blocks of the grid have come here; `arrived` only ever grows.
PK_DEVICE void pk_grid_barrier(unsigned long long *arrived) {
#ifdef PAIKERN_CUDA_ON_CPU
  if (gridDim.x > 1) paikern::on_cpu::complain("a grid barrier: blocks run one after the other here");
#endif
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned long long before = atomicAdd(arrived, 1ull), end = (before / gridDim.x + 1) * gridDim.x;
    while (*const_cast<volatile unsigned long long *>(arrived) < end) {
    }
    __threadfence();
  }
  __syncthreads();
  __threadfence();  // by every thread: lines that its multiprocessor holds from before are read again
}

extern "C" __global__ void __launch_bounds__(256, 2)
    paikern_flow(const PaikernFlowStep *steps, long long from, long long to, unsigned long long *arrived) {
  for (long long i = from; i < to; ++i) {
    if (i > from) pk_grid_barrier(arrived);
    pk_flow_step(steps[i], blockIdx.x, gridDim.x);
  }
}

// Both sweeps over a path graph on the device: a table of instructions that kernels walk, without a word to the host.
//
//   reset, fill, forward, adjoint, join, scale, mean, pool, total, record, ...   (PaikernFlowStep below)
//
// The table is made once (paikern/pathgraph/device_program.py): every map has its place, every weight its geometry, and
// every value that is written a slot of its own for its power of two, so that nobody reads a slot while somebody else
// rewrites it. Numbers as in paikern/pathgraph/flow.py: after every weight step the largest value is brought into
// [1, 2), here when it is read (map_scale.cuh).
//
// `paikern_flow` runs instructions [from, to) of the table on a grid whose blocks are all on the device at the same
// time, with a barrier between two instructions: a network of many small layers is one launch a sweep. Large layers are
// launched one by one, on as many blocks as they can use. Results have
// the same bits either way, since no instruction depends on the grid.
//
// Bytes moved: those of the products (path_*.cuh), and each map once or twice. Limit: for small layers the barriers,
// one a layer. Not yet measured on a GPU.
#pragma once

#include "flow_steps.cuh"
#include "select_band.cuh"

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
    mantissa += pk_block_sum(sum) * pk_double_power(pk_exponent_of(*term.scale) - top);
  }
  if (threadIdx.x == 0) {
    PaikernFlowRecord &now = *step.record;
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
  PaikernFlowRecord &now = *step.record;
  now.dead = number(dead);
  now.broken = number(broken);
  step.record[1 + *step.round] = now;
}

// A new round: slots, counters and the record are put back, and the numbers of this round brought to where kernels
// look for them. `pool` points to the round's number of pairs (from, to, count a round, of eight bytes each).
PK_DEVICE void pk_flow_reset(const PaikernFlowStep &step) {
  PaikernFlowRecord &now = *step.record;
  if (threadIdx.x == 0) {
    *step.round += 1;
    now = {0.0, 0, -1, -1, -1, 0, 0, 0, 0};
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

// --- updates of scores in training -----------------------------------------------------------------------------------

// Which nodes are alive, terms being what arrives (y), what leaves (g) and the x of the layer; and what makes g^T x the
// gradient of log R, 2**exponent / R, into *out.
PK_DEVICE void pk_flow_live(const PaikernFlowStep &step, long long block, long long blocks) {
  const PaikernTerm &y = step.terms[0], &g = step.terms[1], &x = step.terms[2];
  pk_live_nodes(y.values, y.scale, g.values, g.scale, step.counts != 0, step.outer, step.channels, step.inner,
                reinterpret_cast<unsigned char *>(step.places), static_cast<unsigned long long *>(step.data), block,
                blocks);
  if (block != 0 || threadIdx.x != 0) return;
  const PaikernFlowRecord &now = *step.record;
  long long by = pk_exponent_of(*x.scale) + pk_exponent_of(*g.scale) - now.top;
  by = by < -2000 ? -2000 : by > 2000 ? 2000 : by;
  const long long half = by / 2;
  *step.out = static_cast<float>(1.0 / now.mantissa * pk_double_power(half) * pk_double_power(by - half));
}

// --- sweeps that meet scores ----------------------------------------------------------------------------------------

// What a sweep knows of the selection; false where it is an adjoint and nothing else. *terms is the map that comes in,
// `inner` the layer.
PK_DEVICE bool pk_flow_band(const PaikernFlowStep &step, PaikernSweep *sweep) {
  const PaikernSelect &plan = *static_cast<const PaikernSelect *>(step.data);
  const PaikernLayer &layer = plan.layers[step.inner];
  const long long exponent = pk_exponent_of(*step.terms[0].scale) + pk_exponent_of(*step.product.g_scale);
  unsigned least, beyond;
  if (!pk_band_of(plan, exponent, &least, &beyond)) return false;
  *sweep = {step.terms[0].values,
            step.terms[0].scale,
            0.0f,
            reinterpret_cast<unsigned *>(layer.bits),
            &plan.stream->nan,
            least,
            beyond,
            reinterpret_cast<unsigned *>(layer.inside)};
  return true;
}

// --- the table -----------------------------------------------------------------------------------------------------

PK_DEVICE void pk_flow_small(const PaikernFlowStep &step, long long block, long long blocks) {
  switch (step.kind) {
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
    case kPkFlowRectify:
      pk_flow_rectify(step, block, blocks);
      break;
    case kPkFlowUnrectify:
      pk_flow_unrectify(step, block, blocks);
      break;
    case kPkFlowLive:
      pk_flow_live(step, block, blocks);
      break;
    default:
      if (block != 0) return;
      if (step.kind == kPkFlowReset) pk_flow_reset(step);
      if (step.kind == kPkFlowTotal) pk_flow_total(step);
      if (step.kind == kPkFlowRecord) pk_flow_record(step);
      if (step.kind == kPkFlowExponents) pk_flow_exponents(step);
  }
}

// The exponent of what is written: that of what was read. Where terms are joined, pk_flow_join says it.
PK_DEVICE void pk_flow_exponent(const PaikernFlowStep &step, long long block) {
  if (block == 0 && threadIdx.x == 0 && step.from != nullptr) step.scale->exponent = pk_exponent_of(*step.from);
}

PK_DEVICE void pk_flow_step(const PaikernFlowStep &step, long long block, long long blocks) {
  if (step.kind == kPkFlowForward) {
    pk_path_forward(step.product, block, blocks);
  } else if (step.kind == kPkFlowAdjoint) {
    pk_path_adjoint(step.product, block, blocks);
  } else if (step.kind == kPkFlowScore) {
    pk_path_score(step.product, 0.0f, step.out, block, blocks);
  } else if (step.kind == kPkFlowDpai) {
    pk_dpai_update(*static_cast<const PaikernDpai *>(step.data), block, blocks);
  } else {
    pk_flow_small(step, block, blocks);
  }
  pk_flow_exponent(step, block);
}

// Waits until all blocks of the grid have come here: the last one resets the count and opens the next turn. Grids of
// other sizes may follow.
PK_DEVICE void pk_grid_barrier(unsigned long long *arrived) {
#ifdef PAIKERN_CUDA_ON_CPU
  if (gridDim.x > 1) paikern::on_cpu::complain("a grid barrier: blocks run one after the other here");
#endif
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    volatile unsigned long long *turn = arrived + 1;
    const unsigned long long mine = *turn;
    __threadfence();  // the turn is read before anyone can know that this block has come
    if (atomicAdd(arrived, 1ull) + 1 == gridDim.x) {
      *const_cast<volatile unsigned long long *>(arrived) = 0;
      __threadfence();
      *turn = mine + 1;
    } else {
      while (*turn == mine) {
      }
    }
  }
  __syncthreads();
  __threadfence();  // by every thread: lines that its multiprocessor holds from before are read again
}

// Several instructions. The registers of all of them: one block a multiprocessor.
extern "C" __global__ void __launch_bounds__(256, 1)
    paikern_flow(const PaikernFlowStep *steps, long long from, long long to, unsigned long long *arrived) {
  for (long long i = from; i < to; ++i) {
    if (i > from) pk_grid_barrier(arrived);
    pk_flow_step(steps[i], blockIdx.x, gridDim.x);
  }
}

// One instruction; products by themselves are the kernels of path_kernels.cuh.
extern "C" __global__ void __launch_bounds__(256, 2) paikern_flow_sweep_32(const PaikernFlowStep *steps, long long at) {
  PaikernSweep sweep = {};
  if (pk_flow_band(steps[at], &sweep)) {
    pk_adjoint_rows<0, kPkMeetsBand>(steps[at].product, sweep, blockIdx.x, gridDim.x);
  } else {
    pk_adjoint_rows<0, kPkMeetsNothing>(steps[at].product, sweep, blockIdx.x, gridDim.x);
  }
  pk_flow_exponent(steps[at], blockIdx.x);
}

extern "C" __global__ void __launch_bounds__(256, 2) paikern_flow_sweep_16(const PaikernFlowStep *steps, long long at) {
  PaikernSweep sweep = {};
  if (pk_flow_band(steps[at], &sweep)) {
    pk_adjoint_16<kPkMeetsBand>(steps[at].product, sweep, blockIdx.x, gridDim.x);
  } else {
    pk_adjoint_16<kPkMeetsNothing>(steps[at].product, sweep, blockIdx.x, gridDim.x);
  }
  pk_flow_exponent(steps[at], blockIdx.x);
}

extern "C" __global__ void __launch_bounds__(256) paikern_flow_dpai(const PaikernFlowStep *steps, long long at) {
  pk_dpai_update(*static_cast<const PaikernDpai *>(steps[at].data), blockIdx.x, gridDim.x);
}

extern "C" __global__ void __launch_bounds__(256, 4) paikern_flow_small(const PaikernFlowStep *steps, long long at) {
  pk_flow_small(steps[at], blockIdx.x, gridDim.x);
  pk_flow_exponent(steps[at], blockIdx.x);
}

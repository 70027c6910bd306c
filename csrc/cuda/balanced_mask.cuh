// A random mask with given row sums whose columns are as even as they can be: the steps of csrc/cpu/balanced_mask.cpp,
// each over all that does not depend on one another. A row is an input of a group, a column an output.
//
//   starts  prefix sums of rows[i] % outputs, the weights of row i that do not go round all columns; a block a group
//   laps    random permutations of the columns, Fisher and Yates with Philox draws; a thread a lap
//   deal    a row that ends one lap and begins the next may have no column twice: the m-th entry at the beginning of
//   the
//           new lap that it already has is exchanged for the m-th one behind that it has not. A lap must be final
//           before the next is looked at: a block a group, which counts both by prefix sums, lap after lap. Rows behind
//           the last lap take the first columns of one more permutation that they do not have
//   mark    extra[kernel] = 1 where a row has an entry, so that its kernel keeps one weight more than rows[i] /
//   outputs;
//           a block a row
//   draw    the positions in a kernel, Floyd's subsets from Philox; a thread eight kernels, whole bytes of the mask
//   rank    or those of the largest magnitudes; a thread a score, a ballot is 32 bits of the mask
//
// Only integers but for magnitudes, which are compared: the bits are those of the CPU. Bytes moved: 4 an entry written
// and shuffled in place, 1 a kernel, the scores and one bit a weight. Limits: the latency of a lap's exchanges, which
// follow from one another, and that of laps in `deal`; `rank` compares the positions of a kernel with each other.
// Not yet measured on a GPU.
//
// Device code without standard headers: nvcc, NVRTC and csrc/testing/cuda_on_cpu.h compile the same text.
#pragma once

#include "block_scan.cuh"
#include "philox.cuh"

// Nineteen numbers that paikern/backends/cuda_balanced_mask.py fills.
struct PaikernBalanced {
  const long long *rows;  // [groups, inputs]
  long long groups, inputs, outputs, positions;
  long long transposed;  // kernels are stored [groups, inputs, outputs], not [groups, outputs, inputs]
  long long cover;       // at most so many laps, counting those that go round all columns; -1: all it takes
  unsigned long long seed;
  long long stream;
  long long *starts;     // [groups, inputs + 1]
  long long *laps;       // [groups]
  int *order;            // [groups, inputs, outputs]: laps, one after the other, and what goes to favourites
  int *favourites;       // [groups, outputs]
  int *seen;             // [groups, outputs], begins with -1: the last row that was asked for the column
  unsigned char *extra;  // [kernels], begins with 0
  unsigned char *bits;   // packed mask
  const void *scores;    // of the mask's shape, or null
  long long type;        // of the scores: 0 fp32, 1 bf16, 2 fp16, 3 fp64
  long long *nan;        // 1 where a score is NaN
};

constexpr int kPkDealThreads = 256;

extern "C" __global__ void __launch_bounds__(256) paikern_balanced_starts(const PaikernBalanced *task_at) {
  const PaikernBalanced &task = *task_at;
  const long long *rows = task.rows + blockIdx.x * task.inputs;
  long long *starts = task.starts + blockIdx.x * (task.inputs + 1);
  long long dealt = 0, covered = 0;
  for (long long from = 0; from < task.inputs; from += kPkDealThreads) {
    const long long i = from + threadIdx.x, row = i < task.inputs ? rows[i] : 0;
    const long long round = row / task.outputs;
    long long total;
    const long long upto = pk_upto_in_block<kPkDealThreads>(row - round * task.outputs, &total);
    if (i < task.inputs) starts[i + 1] = dealt + upto;
    dealt += total;
    pk_upto_in_block<kPkDealThreads>(round, &total);
    covered += total;
  }
  if (threadIdx.x != 0) return;
  starts[0] = 0;
  const long long laps = (dealt + task.outputs - 1) / task.outputs;
  const long long room = task.cover > covered ? task.cover - covered : 0;
  task.laps[blockIdx.x] = task.cover >= 0 && room < laps ? room : laps;
}

PK_DEVICE unsigned pk_draw_below(unsigned word, unsigned n) { return __umulhi(word, n); }

// The words of one counter, as they are asked for.
struct PaikernDraws {
  uint4 words;
  unsigned first, second, tag, used;
};

PK_DEVICE unsigned pk_next(PaikernDraws *draws, unsigned long long seed) {
  const unsigned place = draws->used & 3;
  if (place == 0) draws->words = pk_philox(make_uint4(draws->first, draws->second, draws->used >> 2, draws->tag), seed);
  ++draws->used;
  const uint4 &words = draws->words;
  return place == 0 ? words.x : place == 1 ? words.y : place == 2 ? words.z : words.w;
}

// Thread number / (inputs + 1) is the group; its last lap is that of the favourites, whose number is 2**32 - 1.
extern "C" __global__ void paikern_balanced_laps(const PaikernBalanced *task_at) {
  const PaikernBalanced &task = *task_at;
  const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  const long long group = i / (task.inputs + 1), lap = i - group * (task.inputs + 1), outputs = task.outputs;
  if (group >= task.groups) return;
  const long long laps = task.laps[group], total = task.starts[group * (task.inputs + 1) + task.inputs];
  const bool last = lap == task.inputs;
  if (last ? total <= laps * outputs : lap >= laps) return;
  int *order = last ? task.favourites + group * outputs : task.order + (group * task.inputs + lap) * outputs;
  for (long long k = 0; k < outputs; ++k) order[k] = static_cast<int>(k);
  PaikernDraws draws = {make_uint4(0, 0, 0, 0), last ? 0xffffffffu : static_cast<unsigned>(lap),
                        static_cast<unsigned>(group), static_cast<unsigned>(2 * task.stream), 0};
  for (long long k = outputs - 1; k > 0; --k) {
    const unsigned other = pk_draw_below(pk_next(&draws, task.seed), static_cast<unsigned>(k + 1));
    const int held = order[k];
    order[k] = order[other];
    order[other] = held;
  }
}

// The first row that ends behind `at`.
PK_DEVICE long long pk_row_at(const long long *starts, long long inputs, long long at) {
  long long low = 0, high = inputs;
  while (low < high) {
    const long long middle = (low + high) / 2;
    if (starts[middle + 1] > at) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Makes room at the beginning of a lap, [border, end), for the row that has had the columns marked in `seen`: its m-th
// entry that is marked is exchanged for the m-th one from `end` on that is not. There are enough: a row is shorter than
// a lap.
PK_DEVICE void pk_exchange(int *order, const int *seen, int row, long long outputs, long long border, long long end) {
  __shared__ long long places[kPkDealThreads], last;
  const long long thread = threadIdx.x;
  long long next = end;
  for (long long from = border; from < end; from += kPkDealThreads) {
    const long long k = from + thread;
    const bool twice = k < end && seen[order[k]] == row;
    long long wanted;
    const long long turn = pk_upto_in_block<kPkDealThreads>(twice, &wanted);
    for (long long given = 0; given < wanted;) {  // a block of threads of the lap at a time
      const long long place = next + thread;
      const bool free = place < border + outputs && seen[order[place]] != row;
      long long found;
      const long long number = given + pk_upto_in_block<kPkDealThreads>(free, &found);
      if (free && number <= wanted) places[number - 1] = place;
      if (free && number == wanted) last = place;
      __syncthreads();
      if (twice && turn > given && turn <= given + found) {
        const long long other = places[turn - 1];
        const int held = order[k];
        order[k] = order[other];
        order[other] = held;
      }
      given += found;
      next = given < wanted ? next + kPkDealThreads : last + 1;
    }
  }
}

// The rest of a row, [at, end), goes to the first favourites that are not marked.
PK_DEVICE void pk_favour(int *order, const int *favourites, const int *seen, long long outputs, int row, long long at,
                         long long end) {
  for (long long from = 0; at < end; from += kPkDealThreads) {
    const long long k = from + threadIdx.x;
    const bool wanted = k < outputs && seen[favourites[k]] != row;
    long long found;
    const long long place = at + pk_upto_in_block<kPkDealThreads>(wanted, &found) - 1;
    if (wanted && place < end) order[place] = favourites[k];
    at += found;
  }
}

extern "C" __global__ void __launch_bounds__(256) paikern_balanced_deal(const PaikernBalanced *task_at) {
  const PaikernBalanced &task = *task_at;
  const long long outputs = task.outputs, inputs = task.inputs, thread = threadIdx.x;
  const long long *starts = task.starts + blockIdx.x * (inputs + 1);
  const long long total = starts[inputs], dealt = task.laps[blockIdx.x] * outputs;
  int *order = task.order + blockIdx.x * inputs * outputs, *seen = task.seen + blockIdx.x * outputs;
  const int *favourites = task.favourites + blockIdx.x * outputs;
  for (long long border = outputs; border <= dealt && border < total; border += outputs) {
    const long long i = pk_row_at(starts, inputs, border), begin = starts[i], end = starts[i + 1];
    if (begin >= border) continue;
    const int row = static_cast<int>(i);
    for (long long k = begin + thread; k < border; k += kPkDealThreads) seen[order[k]] = row;
    __syncthreads();
    if (border < dealt) {
      pk_exchange(order, seen, row, outputs, border, end);
      __syncthreads();
    } else {
      pk_favour(order, favourites, seen, outputs, row, border, end);
    }
  }
  // Rows behind the last lap; a warp each.
  for (long long i = pk_row_at(starts, inputs, dealt) + thread / 32; i < inputs; i += kPkDealThreads / 32) {
    if (starts[i] < dealt) continue;
    for (long long k = thread % 32; k < starts[i + 1] - starts[i]; k += 32) order[starts[i] + k] = favourites[k];
  }
}

// A block for each of groups * inputs rows.
extern "C" __global__ void paikern_balanced_mark(const PaikernBalanced *task_at) {
  const PaikernBalanced &task = *task_at;
  const long long row = blockIdx.x, group = row / task.inputs, input = row - group * task.inputs;
  const long long *starts = task.starts + group * (task.inputs + 1);
  const int *order = task.order + group * task.inputs * task.outputs;
  unsigned char *extra = task.extra + group * task.inputs * task.outputs;
  for (long long k = starts[input] + threadIdx.x; k < starts[input + 1]; k += blockDim.x) {
    extra[task.transposed ? input * task.outputs + order[k] : order[k] * task.inputs + input] = 1;
  }
}

// Weights that a kernel keeps.
PK_DEVICE long long pk_kept_in(const PaikernBalanced &task, long long kernel) {
  long long row;
  if (task.transposed) {
    row = kernel / task.outputs;
  } else {
    const long long line = kernel / task.inputs;
    row = line / task.outputs * task.inputs + (kernel - line * task.inputs);
  }
  return task.rows[row] / task.outputs + task.extra[kernel];
}

PK_DEVICE bool pk_bit(const unsigned char *bits, long long i) { return ((bits[i >> 3] >> (i & 7)) & 1) != 0; }
PK_DEVICE void pk_set_bit(unsigned char *bits, long long i) {
  bits[i >> 3] = static_cast<unsigned char>(bits[i >> 3] | (1u << (i & 7)));
}

// The j-th draw is below j + 1, and j itself stands in for one that is taken.
extern "C" __global__ void paikern_balanced_draw(const PaikernBalanced *task_at) {
  const PaikernBalanced &task = *task_at;
  const long long eight = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x, positions = task.positions;
  const long long kernels = task.groups * task.inputs * task.outputs, bytes = (kernels * positions + 7) / 8;
  const long long end = (eight + 1) * positions < bytes ? (eight + 1) * positions : bytes;
  for (long long i = eight * positions; i < end; ++i) task.bits[i] = 0;
  for (long long kernel = 8 * eight; kernel < 8 * eight + 8 && kernel < kernels; ++kernel) {
    const long long kept = pk_kept_in(task, kernel), first = kernel * positions;
    PaikernDraws draws = {make_uint4(0, 0, 0, 0), static_cast<unsigned>(kernel), static_cast<unsigned>(kernel >> 32),
                          static_cast<unsigned>(2 * task.stream + 1), 0};
    for (long long j = positions - kept; j < positions; ++j) {
      long long place = j;
      if (kept < positions) {
        const long long drawn = pk_draw_below(pk_next(&draws, task.seed), static_cast<unsigned>(j + 1));
        if (!pk_bit(task.bits, first + drawn)) place = drawn;
      }
      pk_set_bit(task.bits, first + place);
    }
  }
}

PK_DEVICE void pk_read_magnitude(const PaikernBalanced &task, long long i, float *value) {
  *value = fabsf(pk_value(task.scores, task.type, i));
}
PK_DEVICE void pk_read_magnitude(const PaikernBalanced &task, long long i, double *value) {
  *value = fabs(static_cast<const double *>(task.scores)[i]);
}

// The rank of a score in its kernel, as far as `kept`.
template <class Value>
PK_DEVICE long long pk_rank(const PaikernBalanced &task, long long i, long long first, long long kept) {
  Value own, other;
  pk_read_magnitude(task, i, &own);
  if (own != own) atomicMax(task.nan, 1ll);
  long long before = 0;
  for (long long j = first; j < first + task.positions && before < kept; ++j) {
    pk_read_magnitude(task, j, &other);
    before += other > own || (other == own && j < i);
  }
  return before;
}

// Without scores for kernels of one position.
extern "C" __global__ void paikern_balanced_rank(const PaikernBalanced *task_at) {
  const PaikernBalanced &task = *task_at;
  const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x, positions = task.positions;
  const long long count = task.groups * task.inputs * task.outputs * positions;
  bool keeps = false;
  if (i < count) {
    const long long kernel = i / positions, kept = pk_kept_in(task, kernel);
    long long rank = 0;
    if (task.scores != nullptr) {
      rank = task.type == 3 ? pk_rank<double>(task, i, kernel * positions, kept)
                            : pk_rank<float>(task, i, kernel * positions, kept);
    }
    keeps = rank < kept;
  }
  const unsigned word = __ballot_sync(0xffffffffu, keeps);
  if (i % 8 == 0 && i < count) task.bits[i / 8] = static_cast<unsigned char>(word >> (i % 32));
}

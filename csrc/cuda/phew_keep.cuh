// Sets the bits of walks in their order until a budget is met: exactly what csrc/cpu/phew.cpp does one after the other.
//
// A round looks at walks up to the next multiple of 1000, one a thread, against the bits as they are:
//
//   new[w]  bits of walk w that are not set; a bound, since walks of the same round may share some
//   lead    walks with nothing new, and those with more than is missing, up to the first that is neither. Nothing they
//           pass is set, so that their numbers hold: the ones that are too long are skipped
//   run     walks from there on while the sum of new[] is at most what is missing: whatever they share, all of them
//           are kept. It ends where the sum is what is missing, as the budget can be met only there
//
// Then the run's bits are set, which counts those that are really new. Rounds go on until the walks end or the budget
// is met; one takes at least one walk that is kept, and all there are while the budget is far away: then nothing is
// counted beforehand. A walk may pass a bit twice (a weight that is used twice); `repeats` marks those, where it can
// matter.
//
// Counts are integers and the order in which bits are set changes none of them. Bytes moved: the walks once or twice
// and a word of the mask for every bit of them. Limit: one block, as rounds follow from one another: its threads' reads
// of the mask are all over memory. Not yet measured on a GPU.
//
// Device code without standard headers: nvcc, NVRTC and csrc/testing/cuda_on_cpu.h compile the same text.
#pragma once

#include "scores.cuh"

constexpr int kPkKeepThreads = 1024;
constexpr long long kPkWindow = 1000;

struct PaikernKept {
  long long kept, walks, window_new, window_skipped, skipped;
  long long status;  // 0 going on, 1 full, 2 stalled, 3 too long
};

// repeats [count, width]: 1 where the walk has had the bit before. Not written where all walks fit whatever they hold.
extern "C" __global__ void paikern_phew_repeats(const long long *walks, long long count, long long width,
                                                const PaikernKept *state, long long target, unsigned char *repeats) {
  const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count * width || state->kept + count * width <= target) return;
  const long long *walk = walks + i / width * width, own = i % width;
  bool again = false;
  for (long long j = 0; j < own && !again; ++j) again = walk[j] == walk[own];
  repeats[i] = again;
}

// The sum of the values of this thread and those before it; *total of all. Not twice without a barrier between.
PK_DEVICE long long pk_sum_upto(long long value, long long *total) {
  __shared__ long long sums[kPkKeepThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int by = 1; by < 32; by *= 2) {
    const long long other = __shfl_up_sync(0xffffffffu, value, by);
    if (lane >= by) value += other;
  }
  if (lane == 31) sums[warp] = value;
  __syncthreads();
  *total = 0;
  for (int w = 0; w < kPkKeepThreads / 32; ++w) {
    if (w == warp) value += *total;
    *total += sums[w];
  }
  return value;
}

// The first thread that says yes, or the number of threads. Not twice without a barrier between.
PK_DEVICE long long pk_first_yes(bool yes) {
  __shared__ unsigned votes[kPkKeepThreads / 32];
  const unsigned word = __ballot_sync(0xffffffffu, yes);
  if (threadIdx.x % 32 == 0) votes[threadIdx.x / 32] = word;
  __syncthreads();
  for (int w = 0; w < kPkKeepThreads / 32; ++w) {
    if (votes[w] != 0) return 32ll * w + __ffs(static_cast<int>(votes[w])) - 1;
  }
  return kPkKeepThreads;
}

PK_DEVICE long long pk_new_bits(const long long *walk, const unsigned char *repeats, long long width,
                                const unsigned *words) {
  long long found = 0;
  for (long long j = 0; j < width && walk[j] >= 0; ++j) {
    found += ((words[walk[j] >> 5] >> (walk[j] & 31)) & 1) == 0 && repeats[j] == 0;
  }
  return found;
}

PK_DEVICE long long pk_set_bits(const long long *walk, long long width, unsigned *words) {
  long long found = 0;
  for (long long j = 0; j < width && walk[j] >= 0; ++j) {
    const unsigned bit = 1u << (walk[j] & 31);
    found += (atomicOr(words + (walk[j] >> 5), bit) & bit) == 0;
  }
  return found;
}

extern "C" __global__ void __launch_bounds__(1024)
    paikern_phew_keep(unsigned *words, PaikernKept *state, const long long *walks, const unsigned char *repeats,
                      long long count, long long width, long long target, long long stall, long long exact) {
  __shared__ PaikernKept now;
  const long long thread = threadIdx.x;
  if (thread == 0) {
    now = *state;
    if (now.kept >= target) now.status = 1;
  }
  __syncthreads();
  for (long long at = 0; at < count && now.status == 0;) {
    const long long missing = target - now.kept, left = kPkWindow - now.walks % kPkWindow;
    const long long size = left < count - at ? left : count - at;
    const long long own = (at + thread) * width;
    long long begin = 0, end = size, skipped = 0, gained = 0;
    if (missing < size * width) {
      const long long fresh = thread < size ? pk_new_bits(walks + own, repeats + own, width, words) : 0;
      begin = pk_first_yes(fresh > 0 && (fresh <= missing || exact == 0));
      skipped = __syncthreads_count(thread < begin && fresh > missing);
      long long total;
      const long long upto = pk_sum_upto(thread < begin ? 0 : fresh, &total);
      end = pk_first_yes(thread > begin && (upto > missing || upto - fresh >= missing));
      end = end < size ? end : size;
    }
    if (thread >= begin && thread < end) gained = pk_set_bits(walks + own, width, words);
    long long total;
    pk_sum_upto(gained, &total);
    if (thread == 0) {
      now.kept += total;
      now.window_new += total;
      now.walks += end;
      now.skipped += skipped;
      now.window_skipped += skipped;
      if (now.kept >= target) {
        now.status = 1;
      } else if (now.walks % kPkWindow == 0) {
        if (now.window_new < stall) now.status = now.window_skipped > 0 ? 3 : 2;
        now.window_new = now.window_skipped = 0;
      }
    }
    __syncthreads();
    at += end;
  }
  if (thread == 0) *state = now;
}

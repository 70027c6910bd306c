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

#include "block_scan.cuh"

constexpr int kPkKeepThreads = 1024;
constexpr int kPkWindow = 1000;

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

// The first thread that says yes, or the number of threads. Not twice without a barrier between.
PK_DEVICE int pk_first_yes(bool yes) {
  __shared__ unsigned votes[kPkKeepThreads / 32];
  const unsigned word = __ballot_sync(0xffffffffu, yes);
  if (threadIdx.x % 32 == 0) votes[threadIdx.x / 32] = word;
  __syncthreads();
  for (int w = 0; w < kPkKeepThreads / 32; ++w) {
    if (votes[w] != 0) return 32 * w + __ffs(static_cast<int>(votes[w])) - 1;
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

// Every thread counts what all of them do, from the same sums.
extern "C" __global__ void __launch_bounds__(1024)
    paikern_phew_keep(unsigned *words, PaikernKept *state, const long long *walks, const unsigned char *repeats,
                      long long count, long long width, long long target, long long stall, long long exact) {
  const int thread = threadIdx.x;
  const bool whole = exact != 0;
  long long kept = state->kept, window_new = state->window_new, at = 0;
  int left = kPkWindow - static_cast<int>(state->walks % kPkWindow);  // walks of the window
  int window_skipped = static_cast<int>(state->window_skipped), skipped = 0;
  int status = kept >= target ? 1 : static_cast<int>(state->status);
  while (at < count && status == 0) {
    const int size = left < count - at ? left : static_cast<int>(count - at);
    const long long own = (at + thread) * width;
    long long total;
    int begin = 0, end = size;
    if (target - kept < size * width) {
      const long long missing = target - kept;
      const long long fresh = thread < size ? pk_new_bits(walks + own, repeats + own, width, words) : 0;
      begin = pk_first_yes(fresh > 0 && (fresh <= missing || !whole));
      const int many = __syncthreads_count(thread < begin && fresh > missing);
      const long long upto = pk_upto_in_block<kPkKeepThreads>(thread < begin ? 0 : fresh, &total);
      end = pk_first_yes(thread > begin && (upto > missing || upto - fresh >= missing));
      end = end < size ? end : size;
      skipped += many;
      window_skipped += many;
    }
    const bool mine = thread >= begin && thread < end;
    pk_upto_in_block<kPkKeepThreads>(mine ? pk_set_bits(walks + own, width, words) : 0, &total);
    kept += total;
    window_new += total;
    at += end;
    left -= end;
    if (kept >= target) {
      status = 1;
    } else if (left == 0) {
      if (window_new < stall) status = window_skipped > 0 ? 3 : 2;
      window_new = window_skipped = 0;
    }
    if (left == 0) left = kPkWindow;
  }
  // Without a round nothing changes but the status, which nobody who reads it late minds.
  if (thread != 0) return;
  *state = {kept, state->walks + at, window_new, window_skipped, state->skipped + skipped, status};
}
